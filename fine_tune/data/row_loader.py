"""PyTorch's data loader with workers that a cluster's signal does not end, and that end with what they work for."""

import atexit
import signal
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

Row = TypeVar("Row", covariant=True)

_iterators: "weakref.WeakSet[Any]" = weakref.WeakSet()  # those that may have workers


class RowLoader(DataLoader[Row]):
    """A ``DataLoader`` whose workers are gone when its iteration is over, and when the process ends.

    PyTorch ends workers when nothing refers to their iterator any more. The traceback of an error does, until the
    process is over; then they would be sent SIGTERM, which they ignore, and be waited for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["worker_init_fn"] = leave_sigterm_to_parent
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        if self.num_workers:
            _iterators.add(iterator)
        try:
            yield from iterator
        finally:
            if self.num_workers:
                end_workers(iterator)


def leave_sigterm_to_parent(_: int) -> None:
    """Let a data worker live on: a cluster signals every process of a run, and the run still needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers(iterator: Any) -> None:
    """Ask the workers of a PyTorch iterator to end, then kill the one that waits for what a killed one held."""
    _iterators.discard(iterator)
    iterator._shutdown_workers()
    for worker in iterator._workers:
        worker.kill()


@atexit.register
def _end_all_workers() -> None:
    for iterator in list(_iterators):
        end_workers(iterator)
