"""Room on the disk: checked before writing, told in bytes when it runs out."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fine_tune.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(target: Path, needed: int, unfinished: Path) -> Iterator[None]:
    """Write a checkpoint where there is room for it; on any failure what was written of it goes.

    Args:
        target: Its final name, for the message.
        needed: Bytes it will take.
        unfinished: The folder it is written to.

    Raises:
        UserError: Bytes needed and free, or why the place cannot be written.
    """
    try:
        free = free_bytes(unfinished.parent)
        if free < needed:
            raise UserError(_no_room(target, needed, free, ""))
        yield
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except BaseException as error:
        needed = max(needed, _bytes_in(unfinished))
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = full_reason(error)
        if reason is not None:
            free = free_bytes(unfinished.parent)
            raise UserError(_no_room(target, needed, free, f" ({reason})")) from error
        if isinstance(error, OSError):
            raise UserError(
                f"checkpoint: '{target}' cannot be written: {error.strerror}; set trainer.default_root_dir"
            ) from error
        raise


@contextmanager
def told_by_path(path: Path, needed: int, how: str, *, only_full: bool = False) -> Iterator[None]:
    """Write what a run needs before its first step; what the disk refuses is the user's to mend.

    Args:
        path: What is written.
        needed: Bytes it will take, roughly.
        how: The setting that puts it elsewhere.
        only_full: Leave all errors alone but those of a full disk: others may be of what is read meanwhile.

    Raises:
        UserError: The path, why it cannot be written, bytes needed and free.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = full_reason(error)
        if reason is None and isinstance(error, OSError) and not only_full:
            reason = error.strerror or str(error)
        if reason is None:
            raise
        free = format_bytes(free_bytes(path.parent))
        raise UserError(
            f"'{path}' cannot be written: {reason}; it needs about {format_bytes(needed)}, {free} are free; free some, "
            f"or set {how}"
        ) from error


def full_reason(error: BaseException | None) -> str | None:
    """Return the system's words for a full disk if that is what went wrong, whichever library met it.

    Rust libraries (safetensors, tokenizers) give the number of the system's error only in their text.
    """
    while error is not None:
        for number in FULL:
            own = isinstance(error, OSError) and error.errno == number
            if own or f"(os error {number})" in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def free_bytes(folder: Path) -> int:
    """Return what may still be written to the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_bytes(count: int) -> str:
    """Return ``1.2 GB``, ``34.5 MB`` or ``6 kB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.95 * size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _no_room(target: Path, needed: int, free: int, reason: str) -> str:
    return (
        f"checkpoint: '{target}' needs {format_bytes(needed)}, {format_bytes(free)} are free{reason}; "
        "free some, or set checkpoint.keep or trainer.default_root_dir"
    )


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
