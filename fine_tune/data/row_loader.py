"""PyTorch's data loader with workers that a cluster's signal does not end, and that end with the iteration."""

import signal
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

Row = TypeVar("Row", covariant=True)


class RowLoader(DataLoader[Row]):
    """A ``DataLoader`` whose workers are gone when its iteration is over, also by an error.

    PyTorch ends the workers once nothing refers to the iterator, which the traceback of an error in it does until the
    process is over; at exit it sends them SIGTERM, which they ignore, and waits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, worker_init_fn=leave_sigterm_to_parent, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        try:
            yield from iterator
        finally:
            if self.num_workers:
                iterator._shutdown_workers()  # type: ignore[attr-defined]
                for worker in iterator._workers:  # type: ignore[attr-defined]
                    worker.kill()  # one that waits for what a killed one held


def leave_sigterm_to_parent(_: int) -> None:
    """Let a data worker live on: a cluster signals every process of a run, and the run still needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
