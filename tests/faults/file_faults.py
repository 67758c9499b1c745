"""Make the n-th file operation of this process fail, or kill it there: SQLite's way of testing a writer."""

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REMOVALS = ("unlink", "rmdir")
OPERATIONS = ("fsync", "rename", "replace", "mkdir")


class Countdown:
    """Counts file operations; at the n-th, ``fault`` is called, after half of the data if it is a write."""

    def __init__(self, n: int, fault: Callable[[], None]) -> None:
        self.left, self.fault = n, fault

    def hit(self) -> bool:
        self.left -= 1
        return self.left == 0


class _File:
    """A file opened for writing, whose writes count."""

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self._file, self._countdown = file, countdown

    def write(self, data: Any) -> int:
        if self._countdown.hit():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._countdown.fault()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def fault_at(n: int, fault: Callable[[], None], removals: bool = True) -> Iterator[Countdown]:
    """Call ``fault`` at the n-th operation; ``left`` is positive afterwards if there were fewer."""
    operations = (*OPERATIONS, *REMOVALS) if removals else OPERATIONS
    countdown, real_open = Countdown(n, fault), builtins.open
    real = {name: getattr(os, name) for name in operations}

    def counted(name: str) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            if countdown.hit():
                countdown.fault()
            return real[name](*args, **kwargs)

        return act

    def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = real_open(file, mode, *args, **kwargs)
        return _File(opened, countdown) if set(mode) & set("wax+") else opened

    try:
        builtins.open = io.open = counted_open  # type: ignore[assignment]
        for name in operations:
            setattr(os, name, counted(name))
        yield countdown
    finally:
        builtins.open = io.open = real_open
        for name, function in real.items():
            setattr(os, name, function)


def kill() -> None:
    """End this process as SIGKILL does: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)
