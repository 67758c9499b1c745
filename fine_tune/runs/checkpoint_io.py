"""Lightning's door to checkpoints: a snapshot between two steps, written by a thread while training goes on."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from lightning.fabric.plugins import CheckpointIO

from fine_tune.runs import checkpoint as folders
from fine_tune.runs.snapshot import Snapshot, bytes_of

log = logging.getLogger("fine_tune")


@dataclass(frozen=True)
class Saving:
    """How one save is made; Lightning hands it over as ``storage_options``.

    Args:
        facts: What the manifest says of the checkpoint.
        written: Called by the writing thread once the folder has its name, with ``blocked_ms``, ``write_seconds``
            and ``bytes``.
        background: Whether training goes on while it is written.
        started: When training stopped for it (``time.perf_counter``).
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    written: Callable[[dict[str, Any]], None] | None = None
    background: bool = True
    started: float = field(default_factory=time.perf_counter)


class FolderCheckpointIO(CheckpointIO):
    """Write and read checkpoint folders for Lightning; at most one is being written at a time.

    Args:
        export: Writes the model's files into a folder, given the trained weights.
        check: Of the checkpoint that is loaded first.
    """

    def __init__(self, export: folders.Export, check: folders.WholeCheck | None = None) -> None:
        self.export, self._check = export, check
        self._snapshot = Snapshot()
        self._threads: futures.ThreadPoolExecutor | None = None
        self._writing: futures.Future[None] | None = None
        self._last_size = 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Have the folder ``path`` written.

        With a ``Saving`` this returns once the state is copied, and what goes wrong later is raised by ``wait``.
        Without, it returns once the folder is whole.

        Raises:
            UserError: The save before this one failed, or, without a ``Saving``, this one.
        """
        self.wait()
        saving = storage_options if isinstance(storage_options, Saving) else None
        how = saving or Saving(background=False)
        state_bytes = bytes_of(checkpoint)
        background = how.background and self._fits_in_memory(state_bytes)
        state = self._snapshot.take(checkpoint) if background else checkpoint
        needed = max(state_bytes, self._last_size)
        if self._threads is None:
            self._threads = futures.ThreadPoolExecutor(1, "checkpoint")
        blocked = time.perf_counter() - how.started
        self._writing = self._threads.submit(
            self._write, Path(path), state, how, needed, blocked, background
        )
        if not background:
            futures.wait([self._writing])
        if saving is None:
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            UserError: The last save failed; told once.
        """
        if self._writing is not None:
            futures.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    @property
    def has_failed(self) -> bool:
        """Whether the last save failed and ``wait`` has not told it yet."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the training state of a whole checkpoint; the weights follow from its ``folder``.

        Raises:
            UserError: It is not a checkpoint folder, a file in it is missing or changed, or the last save failed.
        """
        self.wait()
        check, self._check = self._check, None
        begun = check is not None and check.folder == Path(path).resolve()
        return folders.read_state(Path(path), check if begun else None)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint folder."""
        folders.remove_checkpoint(Path(path))

    def teardown(self) -> None:
        """Wait for the last save, and give its memory back."""
        try:
            self.wait()
        finally:
            self._snapshot.release()

    def _write(
        self,
        target: Path,
        state: dict[str, Any],
        how: Saving,
        needed: int,
        blocked: float,
        background: bool,
    ) -> None:
        start = time.perf_counter()
        facts = {"global_step": state["global_step"], **how.facts}
        self._last_size = folders.write_checkpoint(
            target, state, export=self.export, facts=facts, needed=needed
        )
        seconds = time.perf_counter() - start
        blocked += 0 if background else seconds
        if how.written is not None:
            how.written(
                {
                    "blocked_ms": round(1000 * blocked, 1),
                    "write_seconds": round(seconds, 3),
                    "bytes": self._last_size,
                }
            )

    def _fits_in_memory(self, state_bytes: int) -> bool:
        available = psutil.virtual_memory().available + self._snapshot.held_bytes
        if state_bytes < 0.8 * available:
            return True
        log.info("checkpoint: too little memory for a copy of the state; training waits for it")
        return False
