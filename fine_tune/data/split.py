"""Which split a row belongs to: a pure function of its prompt's hash, so no prompt stands on two sides."""

import hashlib

import numpy as np

from fine_tune.errors import UserError

SPLITS = ("train", "validation", "test")
DEFAULT_RATIOS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def group_hash(prompt: str) -> int:
    """Hash the text that keeps rows together, to 64 bits: stable over machines, versions and row order."""
    return int.from_bytes(
        hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )


def check_split(split: dict[str, float]) -> None:
    """Refuse a split that is neither ratios nor row counts.

    Args:
        split: ``{train: 0.8, validation: 0.1, test: 0.1}``, or counts ``{validation: 500, test: 500}``
            (the rest trains).

    Raises:
        UserError: Unknown names, negative numbers, or ratios that do not add up to 1.
    """
    unknown = [name for name in split if name not in SPLITS]
    if unknown:
        raise UserError(f"data.split: unknown split {unknown}; allowed: {', '.join(SPLITS)}")
    if not split:
        raise UserError(
            "data.split: is empty; give ratios or row counts, or none to train on all rows"
        )
    if any(not 0 <= size < float("inf") for size in split.values()):
        raise UserError(f"data.split: every size must be finite and not negative, got {split}")
    if is_counts(split):
        if any(size != int(size) for size in split.values()):
            raise UserError(f"data.split: {split} mixes row counts with shares; give one kind")
        if "train" in split:
            shares = {name: size / 100 for name, size in split.items()}
            as_shares = f"; or as shares: {shares}" if sum(split.values()) == 100 else ""
            raise UserError(
                f"data.split: with row counts, give validation and test; all other rows train{as_shares}"
            )
    elif not abs(sum(split.values()) - 1) <= 1e-6 or split.get("train", 0) <= 0:
        raise UserError(
            f"data.split: ratios {split} must add up to 1 with train above 0; for row counts give whole numbers, "
            "like {validation: 500, test: 500}"
        )


def assign_splits(
    hashes: np.ndarray, split: dict[str, float], strata: np.ndarray | None = None
) -> np.ndarray:
    """Assign each row to a split.

    Ratios: a threshold on the hash, stable when rows are added or reordered; sizes are approximate. Row counts, and
    anything with strata: whole groups with the smallest hashes fill test, then validation, without exceeding the
    count, so sizes are exact but rows at the boundary may move when rows are added.

    Args:
        hashes: ``group_hash`` of each row, uint64.
        split: As in ``check_split``.
        strata: The value of each row that every split shall hold in the same shares, or None. A group that holds
            several values counts as its most frequent one.

    Returns:
        Index into ``SPLITS`` per row, int8.
    """
    test, validation = split.get("test", 0.0), split.get("validation", 0.0)
    if strata is None and not is_counts(split):
        unit = hashes.astype(np.float64) / 2.0**64
        return np.where(unit < test, 2, np.where(unit < test + validation, 1, 0)).astype(np.int8)
    scale = 1 if is_counts(split) else len(hashes)
    wanted = {name: round(split.get(name, 0) * scale) for name in ("test", "validation")}
    groups, group_of_row, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    strata_names = np.array([""]) if strata is None else np.unique(strata)
    codes = _strata_of_groups(group_of_row, len(groups), strata)
    side = np.zeros(len(groups), dtype=np.int8)
    for name, count in wanted.items():
        index = SPLITS.index(name)
        rows_of_strata = np.bincount(codes, weights=sizes, minlength=len(strata_names))
        order = np.array([group_hash(f"{name} {stratum}") for stratum in strata_names])
        for stratum, quota in enumerate(_quotas(rows_of_strata, count, order)):
            _fill(side, sizes, np.flatnonzero(codes == stratum), index, quota)
        _fill(side, sizes, np.arange(len(groups)), index, count - int(sizes[side == index].sum()))
    return side[group_of_row]


def is_counts(split: dict[str, float]) -> bool:
    """Whether a split gives row counts, not ratios."""
    without_train = "train" not in split and all(size == int(size) for size in split.values())
    return without_train or any(size > 1 for size in split.values())


def recommended_ratios(num_rows: int) -> dict[str, float]:
    """Return the ratios recommended for so many rows: more held-out rows where there are few, fewer where many."""
    if num_rows < 10_000:
        return {"train": 0.7, "validation": 0.15, "test": 0.15}
    if num_rows > 100_000:
        return {"train": 0.85, "validation": 0.1, "test": 0.05}
    return DEFAULT_RATIOS


def _fill(side: np.ndarray, sizes: np.ndarray, groups: np.ndarray, index: int, left: int) -> None:
    for group in groups:
        if left <= 0:
            break
        if side[group] == 0 and sizes[group] <= left:
            side[group] = index
            left -= int(sizes[group])


def _strata_of_groups(
    group_of_row: np.ndarray, num_groups: int, strata: np.ndarray | None
) -> np.ndarray:
    if strata is None:
        return np.zeros(num_groups, dtype=np.int64)
    _, codes = np.unique(strata, return_inverse=True)
    pairs, counts = np.unique(np.stack([group_of_row, codes]), axis=1, return_counts=True)
    most_frequent_last = np.lexsort((-pairs[1], counts, pairs[0]))
    chosen = np.zeros(num_groups, dtype=np.int64)
    chosen[pairs[0][most_frequent_last]] = pairs[1][most_frequent_last]
    return chosen


def _quotas(rows_of_strata: np.ndarray, count: int, order: np.ndarray) -> list[int]:
    # largest remainders: 10 of strata of 55, 25 and 20 rows are 5.5, 2.5 and 2.0, so 6, 2 and 2 or 5, 3 and 2; equal
    # remainders go by ``order``, or strata that are early in the alphabet would fill every split
    exact = rows_of_strata * (count / rows_of_strata.sum())
    quotas = np.floor(exact).astype(np.int64)
    most_missing = np.lexsort((order, np.round(quotas - exact, 9)))
    quotas[most_missing[: count - int(quotas.sum())]] += 1
    return [int(quota) for quota in quotas]
