"""Tokens per second between two rows of ``metrics.csv``, without the time of validations."""

import time


class Throughput:
    """A stopwatch over trained tokens, of all ranks."""

    def __init__(self) -> None:
        self._num_tokens, self._start, self._pause_start = 0.0, 0.0, 0.0

    def start(self) -> None:
        """Count from now."""
        self._num_tokens, self._start = 0.0, time.perf_counter()

    def add(self, num_tokens: float) -> None:
        """Count the tokens of a step."""
        self._num_tokens += num_tokens

    def pause(self) -> None:
        """Stop the watch until ``go_on``."""
        self._pause_start = time.perf_counter()

    def go_on(self) -> None:
        """Leave out the time since ``pause``."""
        self._start += time.perf_counter() - self._pause_start

    def take(self) -> float:
        """Return the tokens per second since the last time, and start again."""
        now = time.perf_counter()
        rate = self._num_tokens / (now - self._start)
        self._num_tokens, self._start = 0.0, now
        return rate
