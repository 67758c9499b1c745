"""A checkpoint is a folder: Hugging Face files, the training state, and a manifest of their hashes.

It is whole or not there: written beside its name, hashed, flushed to disk, then renamed. Nothing loaded executes code.
Two hashes of each file: SHA-256 names its content to anyone; XXH3, as fast as memory, is compared whenever it is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from lightning_utilities import apply_to_collection
from torch import Tensor

from fine_tune.errors import DamagedCheckpoint, UserError
from fine_tune.runs.disk import room_for
from fine_tune.runs.identity import MANIFEST

TRAINING_STATE = "training_state.pt"
OWN_SUM = "manifest_sha256"  # of the manifest's text with this value left empty
HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
BLOCK = 1 << 20
LEFTOVERS = ("unfinished", "removed", "replaced")

Export = Callable[[Path, dict[str, Tensor]], None]


def write_checkpoint(
    target: Path,
    checkpoint: dict[str, Any],
    *,
    export: Export,
    facts: Mapping[str, Any],
    needed: int,
) -> int:
    """Write the folder ``target``; what was there before goes only once the new one is whole.

    Args:
        target: Its name; it appears there in one rename.
        checkpoint: Lightning's; ``state_dict`` goes to ``export``, the rest is the training state.
        export: Writes the model's files into a folder, given the trained weights.
        facts: What the manifest says beside the sums, like ``global_step``.
        needed: Bytes it will take.

    Returns:
        Its size in bytes.

    Raises:
        UserError: No room for it (bytes needed and free), or the place cannot be written. Nothing is left of it.
    """
    unfinished = _beside(target, "unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with room_for(target, needed, unfinished):
        unfinished.mkdir(parents=True)
        export(unfinished, dict(checkpoint["state_dict"]))
        state = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        with open(unfinished / TRAINING_STATE, "wb") as handle:  # torch's own writer hides errno
            torch.save(state, handle)
        size = _seal(unfinished, facts)
        _put_in_place(unfinished, target)
    shutil.rmtree(_beside(target, "replaced"), ignore_errors=True)
    return size


class WholeCheck:
    """``check_whole`` in a thread of its own, while the run is built.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        with_one = ThreadPoolExecutor(1, "whole-check")
        self._checking = with_one.submit(check_whole, folder)
        with_one.shutdown(wait=False)

    def wait(self) -> None:
        """Return once it has passed; raises what ``check_whole`` does."""
        self._checking.result()


def begin_check(folder: Path, *, at_once: bool) -> WholeCheck:
    """Look whether a checkpoint has all its files, and begin to compare their content.

    Args:
        folder: The checkpoint.
        at_once: Wait for it.

    Raises:
        UserError: Names the file that is missing or, if it was waited for, whose content changed.
    """
    check_whole(folder, hashes=False)
    check = WholeCheck(folder)
    if at_once:
        check.wait()
    return check


def read_state(folder: Path, check: WholeCheck | None = None) -> dict[str, Any]:
    """Read the training state of a whole checkpoint; the weights follow from its ``folder``.

    Args:
        folder: The checkpoint.
        check: The check of this folder, if it has begun; else it begins here.

    Raises:
        UserError: It is not a checkpoint folder, or a file in it is missing or changed.
    """
    if check is None:
        finish_replacement(folder)
        check = WholeCheck(folder)
    try:
        state = torch.load(
            folder / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True
        )
        state = apply_to_collection(state, Tensor, torch.clone)  # in parallel, unlike a plain read
    finally:
        check.wait()  # damage explains whatever went wrong in reading
    return {**state, "state_dict": {}, "folder": str(folder)}


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint folder; it loses its name first, so that half a folder is never found."""
    if folder.exists():
        doomed = _beside(folder, "removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed saves left beside the checkpoints; for the process that writes there, and no other."""
    for kind in LEFTOVERS:
        for leftover in checkpoints.glob(f".*.{kind}"):
            if kind == "replaced":
                finish_replacement(leftover.with_name(leftover.name[1 : -len(".replaced")]))
            shutil.rmtree(leftover, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Take the old folder back if a kill hit between the two renames that put a new one in its place."""
    replaced = _beside(folder, "replaced")
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)


def global_step(folder: Path) -> int:
    """Return the optimizer steps a whole checkpoint has seen, whatever its folder is called."""
    return int(read_manifest(folder)["global_step"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: ``global_step``, ``score``, and ``sha256`` and ``xxh3_128`` of each file.

    Raises:
        UserError: There is none, or it changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"ckpt_path: '{folder}' is not a checkpoint of this project (it has no {MANIFEST})"
        )
    text = file.read_bytes()
    try:
        manifest = json.loads(text)
        own_sum = manifest[OWN_SUM].encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        own_sum = b""
    unsigned = text.replace(own_sum, b"", 1)
    if hashlib.sha256(unsigned).hexdigest().encode() != own_sum:
        raise UserError(
            f"ckpt_path: '{file}' is damaged (its SHA-256 changed); use another checkpoint"
        )
    return dict(manifest)


def check_whole(folder: Path, *, hashes: bool = True) -> None:
    """Compare a checkpoint folder with its manifest.

    Args:
        folder: The checkpoint.
        hashes: Compare the content of its files, too; without, only the manifest itself and that no file is missing.

    Raises:
        UserError: Names the file that is missing or whose content changed.
    """
    manifest = read_manifest(folder)
    kind = "xxh3_128" if "xxh3_128" in manifest else "sha256"
    sums = manifest[kind]
    for name in sums:
        if not (folder / name).is_file():
            raise DamagedCheckpoint(
                f"ckpt_path: '{folder / name}' is missing; use another checkpoint"
            )
    if not hashes:
        return
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _hashes(folder / name, kind)[kind], sums)
        for (name, expected), actual in zip(sums.items(), found, strict=True):
            if actual != expected:
                raise DamagedCheckpoint(
                    f"ckpt_path: '{folder / name}' is damaged (its {kind} changed); use another checkpoint"
                )


def _seal(folder: Path, facts: Mapping[str, Any]) -> int:
    """Write the manifest of a folder and flush all of it; return its size in bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {str(file.relative_to(folder)): _hashes(file, *HASHES) for file in files}
    sums = {kind: {name: of_file[kind] for name, of_file in hashes.items()} for kind in HASHES}
    unsigned = json.dumps({**facts, **sums, OWN_SUM: ""}, indent=1)
    own_sum = hashlib.sha256(unsigned.encode()).hexdigest()
    manifest = folder / MANIFEST
    manifest.write_text(unsigned.removesuffix('""\n}') + f'"{own_sum}"\n}}', "utf-8")
    inner = [p for p in folder.rglob("*") if p.is_dir()]
    for path in [*files, manifest, *inner, folder]:
        _flush(path)
    return sum(file.stat().st_size for file in [*files, manifest])


def _put_in_place(unfinished: Path, target: Path) -> None:
    if target.exists():
        replaced = _beside(target, "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        unfinished.rename(target)
    except OSError:
        finish_replacement(target)
        raise
    _flush(target.parent)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _hashes(file: Path, *kinds: str) -> dict[str, str]:
    """Hash a file in every way named, reading it once."""
    digests = {kind: HASHES[kind]() for kind in kinds}
    with open(file, "rb") as handle:
        while block := handle.read(BLOCK):
            for digest in digests.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
