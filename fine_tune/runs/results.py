"""What a run measured after training, as its record has it."""

from collections.abc import Mapping
from typing import Any


def is_of_own_rows(record: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a result is of the split the run was planned with, and not of other rows it was tested on later."""
    own = record.get("test_hash")  # None: it has no test split, or an older version wrote it
    return result.get("split") != "test" or own is None or result.get("test_hash") in (None, own)


def own_results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured of the run's own splits, oldest first."""
    return [result for result in record.get("results", []) if is_of_own_rows(record, result)]
