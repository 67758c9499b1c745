"""The rows behind every optimizer step, as they were handed to it: ``rows/rank_0.bin`` ... in the run folder.

One record per step: step and number of rows (uint32), bytes per row id (uint8), then the ids. A million rows take three
bytes each, so ten epochs of them in steps of eight are 41 MB.
"""

import errno
import logging
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.runs.run_folder import run_of

log = logging.getLogger("fine_tune")
FOLDER = "rows"
MOST_WAITING = 10_000  # records of steps in memory while the disk is full
_HEADER = struct.Struct("<IIB")


class StepRows(Callback):
    """Record the row ids of each step on this rank, before the step, in one write that survives a kill.

    On a full disk the records wait in memory, ``MOST_WAITING`` of them at most, until there is room again.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0  # bytes of whole records in the file
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._failing = self._told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what lies behind the checkpoint: those steps are taken, and recorded, again."""
        self._close()
        self._begins_after = trainer.global_step
        self._write(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waiting.append(record(trainer.global_step + 1, batch["row_ids"]))
        self._write(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint outlive the record of its rows, not even when the power fails."""
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._tell(error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._waiting:
            self._write(trainer)
        if self._waiting:
            log.info("WARNING: the row ids of %d steps are lost", len(self._waiting))
        self._close()

    def _write(self, trainer: Trainer) -> None:
        """Write what waits, whole or not at all; what finds no room waits on."""
        try:
            if self._file is None:
                self._file = self._open(trainer)
                self._size = os.fstat(self._file.fileno()).st_size
            elif self._failing:  # what was written of a record when the disk was full
                os.truncate(self._file.fileno(), self._size)
            waiting = b"".join(self._waiting)
            if self._file.write(waiting) < len(waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(waiting)
            self._waiting.clear()
            self._failing = False
        except OSError as error:
            self._tell(error)

    def _open(self, trainer: Trainer) -> IO[bytes]:
        folder = run_of(trainer).path / FOLDER
        own = folder / f"rank_{trainer.global_rank}.bin"
        folder.mkdir(parents=True, exist_ok=True)
        files = [own]
        if trainer.is_global_zero:  # of ranks that take no part any more, too
            files += [f for f in _files(folder) if _rank(f) >= trainer.world_size]
        for file in files:
            keep_until(file, self._begins_after)
        return open(own, "ab", buffering=0)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.info(
                "WARNING: row ids of steps cannot be recorded (%s); training goes on, those of the last %s steps "
                "wait in memory",
                error,
                f"{MOST_WAITING:,}",
            )
        self._told = self._failing = True

    def _close(self) -> None:
        self._waiting.clear()
        self._failing = False
        if self._file is not None:
            self._file.close()
            self._file = None


def record(step: int, row_ids: list[int]) -> bytes:
    """Write the rows of one step as bytes: the ids in as few bytes each as the largest needs."""
    width = max(1, (max(row_ids, default=0).bit_length() + 7) // 8)
    ids = np.asarray(row_ids, dtype="<u8").view(np.uint8).reshape(len(row_ids), 8)[:, :width]
    return _HEADER.pack(step, len(row_ids), width) + ids.tobytes()


def rows_of_step(folder: Path, step: int) -> dict[int, list[int]]:
    """Find the rows of one step, by rank; a rank that took no part then is left out.

    Args:
        folder: ``rows`` of a run.
        step: The optimizer step, from 1.
    """
    found = {}
    for file in _files(folder):
        content = file.read_bytes()
        for of, start, count, width in _records(content):
            if of == step:
                found[_rank(file)] = _ids(content, start, count, width)
    return found


def recorded_steps(folder: Path) -> tuple[int, int] | None:
    """Return the first and the last step recorded, or None without any."""
    steps = [of for file in _files(folder) for of, *_ in _records(file.read_bytes())]
    return (min(steps), max(steps)) if steps else None


def gap_around(folder: Path, step: int) -> tuple[int, int] | None:
    """Return the first and the last step of the gap that a step lies in, or None where no step after it is recorded."""
    steps = {of for file in _files(folder) for of, *_ in _records(file.read_bytes())}
    before, after = {of for of in steps if of < step}, {of for of in steps if of > step}
    return (max(before, default=0) + 1, min(after) - 1) if after and step not in steps else None


def keep_until(file: Path, step: int) -> None:
    """Cut a file behind the record of ``step``, together with a record that a kill left unfinished."""
    if file.is_file():
        records = _records(file.read_bytes())
        ends = [start + count * width for of, start, count, width in records if of <= step]
        os.truncate(file, max(ends, default=0))


def _records(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    position = 0
    while position + _HEADER.size <= len(content):
        step, count, width = _HEADER.unpack_from(content, position)
        start = position + _HEADER.size
        position = start + count * width
        if position > len(content):
            return
        yield step, start, count, width


def _ids(content: bytes, start: int, count: int, width: int) -> list[int]:
    raw = np.frombuffer(content, np.uint8, count * width, start).reshape(count, width)
    wide = np.zeros((count, 8), np.uint8)
    wide[:, :width] = raw
    return [int(i) for i in wide.view("<u8")[:, 0]]


def _files(folder: Path) -> list[Path]:
    return sorted((f for f in folder.glob("rank_*.bin") if f.stem[5:].isdigit()), key=_rank)


def _rank(file: Path) -> int:
    return int(file.stem[5:])
