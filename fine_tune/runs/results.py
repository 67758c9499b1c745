"""What a run measured after training, and how long it trained, as its record has it."""

from collections.abc import Mapping
from typing import Any


def is_of_own_rows(record: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a result is of the split the run was planned with, and not of other rows it was tested on later."""
    own = record.get("test_hash")  # None: it has no test split, or an older version wrote it
    return result.get("split") != "test" or own is None or result.get("test_hash") in (None, own)


def own_results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured of the run's own splits, oldest first."""
    return [result for result in record.get("results", []) if is_of_own_rows(record, result)]


def own_openings(record: Mapping[str, Any]) -> tuple[int, int]:
    """Count the openings of the run's own test split, and the tests of other rows."""
    openings = record.get("test_openings", [])
    own = sum(is_of_own_rows(record, {"split": "test", **opening}) for opening in openings)
    return own, len(openings) - own


def timed_steps(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the steps, after the first number up to the second, that ``seconds`` of a record is about.

    The time of a start that was killed is not known.
    """
    starts = record.get("starts", [])
    ends = [(start.get("from_step"), start.get("to_step")) for start in starts]
    known = [(a, b) for a, b in ends if isinstance(a, int) and isinstance(b, int)]
    seconds = sum(float(start.get("seconds") or 0) for start in starts if "to_step" in start)
    if (
        known and float(record.get("seconds") or 0) > seconds + 1
    ):  # of a start of an older version, too
        return []
    if known or len(starts) > 1:
        return known
    return [(0, int(record.get("step", 0)))]  # of an older version's record
