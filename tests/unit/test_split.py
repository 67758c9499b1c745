"""Splits by the hash of the prompt."""

import numpy as np
import pytest

from fine_tune.data.split import assign_splits, check_split, group_hash
from fine_tune.errors import UserError

RATIOS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def hashes(prompts: list[str]) -> np.ndarray:
    return np.array([group_hash(prompt) for prompt in prompts], dtype=np.uint64)


def test_the_hash_never_changes() -> None:
    assert group_hash("Ibu kota Indonesia adalah") == 0x50ECC30C151C944


def test_nobody_changes_sides_when_rows_are_shuffled_and_added() -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    before = dict(zip(prompts, assign_splits(hashes(prompts), RATIOS), strict=True))
    more = [*[f"new {i}" for i in range(100)], *reversed(prompts)]
    after = dict(zip(more, assign_splits(hashes(more), RATIOS), strict=True))
    assert all(before[prompt] == after[prompt] for prompt in prompts)
    sizes = np.bincount(list(before.values()))
    assert 760 < sizes[0] < 840


def test_equal_prompts_stay_together() -> None:
    prompts = [f"prompt {i % 50}" for i in range(500)]
    for split in (RATIOS, {"validation": 100, "test": 50}):
        sides = assign_splits(hashes(prompts), split)
        assert all(len(set(sides[i::50])) == 1 for i in range(50))


def test_row_counts_are_exact() -> None:
    sides = assign_splits(
        hashes([f"prompt {i}" for i in range(100)]), {"validation": 20, "test": 10}
    )
    assert np.bincount(sides).tolist() == [70, 20, 10]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": 0.8, "validation": 0.3}, "must add up to 1"),
        ({"train": 0.8, "valid": 0.2}, "unknown split"),
        ({"validation": -5, "test": 10}, "negative"),
        ({"train": 100, "test": 10}, "all other rows train"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(split: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_split(split)
