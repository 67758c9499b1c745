"""Splits by the hash of the prompt."""

import numpy as np
import pytest

from fine_tune.data.split import assign_splits, check_split, group_hash, recommended_ratios
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


def test_counts_of_one_are_counts() -> None:
    split = {"validation": 1, "test": 1}
    check_split(split)
    assert np.bincount(assign_splits(hashes(list("abcd")), split)).tolist() == [2, 1, 1]


def test_small_strata_are_spread_over_the_splits_whatever_their_names() -> None:
    names = [f"topik{i:03d}" for i in range(400) for _ in range(3)]
    sides = assign_splits(hashes([f"p {i}" for i in range(1200)]), RATIOS, np.array(names))
    assert np.bincount(sides).tolist() == [960, 120, 120]
    early = [side for name, side in zip(names, sides, strict=True) if name < "topik120"]
    assert 20 < early.count(2) < 60  # 36 of the 120 test rows, not all of them


def test_strata_get_the_same_share_of_every_split() -> None:
    strata = np.array(["law"] * 55 + ["facts"] * 25 + ["sums"] * 20)
    prompts = [f"prompt {i}" for i in range(100)]
    sides = assign_splits(hashes(prompts), {"validation": 20, "test": 10}, strata)
    assert np.bincount(sides).tolist() == [70, 20, 10]
    # largest remainders: test 5.5, 2.5, 2.0 -> 6 + 2 + 2 or 5 + 3 + 2; validation 11, 5 and 4 exactly
    assert [int((strata[sides == 1] == name).sum()) for name in ("law", "facts", "sums")] == [
        11,
        5,
        4,
    ]
    assert int((strata[sides == 2] == "sums").sum()) == 2


def test_strata_make_ratios_exact_whatever_the_order() -> None:
    strata = np.array(["a", "b"] * 100)
    prompts = [f"prompt {i}" for i in range(200)]
    sides = assign_splits(hashes(prompts), RATIOS, strata)
    assert np.bincount(sides).tolist() == [160, 20, 20]
    assert all((strata[sides == side] == "a").sum() == 10 for side in (1, 2))
    order = np.random.default_rng(0).permutation(200)
    shuffled = assign_splits(hashes([prompts[i] for i in order]), RATIOS, strata[order])
    assert shuffled.tolist() == sides[order].tolist()


def test_a_group_of_several_strata_stays_together() -> None:
    prompts = [f"prompt {i // 4}" for i in range(200)]
    strata = np.array(["a", "a", "a", "b"] * 50)
    sides = assign_splits(hashes(prompts), {"validation": 40, "test": 20}, strata)
    assert np.bincount(sides).tolist() == [140, 40, 20]
    assert all(len(set(sides[4 * i : 4 * i + 4])) == 1 for i in range(50))


@pytest.mark.parametrize(
    ("num_rows", "ratios"),
    [(9_999, (0.7, 0.15, 0.15)), (10_000, (0.8, 0.1, 0.1)), (100_001, (0.85, 0.1, 0.05))],
)
def test_recommended_ratios(num_rows: int, ratios: tuple[float, float, float]) -> None:
    assert tuple(recommended_ratios(num_rows).values()) == ratios


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": 0.8, "validation": 0.3}, "must add up to 1"),
        ({"train": 0.8, "valid": 0.2}, "unknown split"),
        ({"validation": -5, "test": 10}, "negative"),
        ({"train": 100, "test": 10}, "all other rows train"),
        ({"validation": float("inf"), "test": 3}, "finite and not negative"),
        ({"validation": 3.7, "test": 0.5}, "mixes row counts with shares"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(split: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_split(split)
