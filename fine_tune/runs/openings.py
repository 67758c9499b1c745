"""Where the openings of a sealed test split are noted: beside the split, so that no run has to be there for them."""

import json
from pathlib import Path
from typing import Any

TEST_SPLITS = "test_splits"  # in data.cache_dir
OPENINGS_FILE = "openings.jsonl"


def read_openings(split: Path) -> list[dict[str, Any]]:
    """List what was noted of the openings of a split, oldest first.

    Args:
        split: Its folder, ``<cache>/test_splits/<hash>``.

    Raises:
        ValueError: A line of it is no JSON.
    """
    file = split / OPENINGS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
