"""Counting repeated documents on the disk."""

from pathlib import Path

import numpy as np
import pytest

from fine_tune.data import text_facts
from fine_tune.data.text_facts import count_repeated


@pytest.mark.parametrize(
    ("hashes", "repeated"),
    [([], 0), ([7], 0), ([7, 7], 1), ([5, 9, 5, 5, 1, 9], 3), ([2**64 - 1, 0, 2**64 - 1], 1)],
)
@pytest.mark.parametrize("at_once", [1, 2, 2**20])
def test_documents_that_repeat_an_earlier_one_are_counted(
    hashes: list[int],
    repeated: int,
    at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_facts, "COMPARED_AT_ONCE", at_once)
    file = tmp_path / "hashes"
    file.write_bytes(np.asarray(hashes, dtype=np.uint64).tobytes())
    assert count_repeated(file) == repeated
