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
    if any(not size >= 0 for size in split.values()):
        raise UserError(f"data.split: {split} holds a negative size")
    if _is_counts(split):
        if "train" in split:
            raise UserError(
                "data.split: with row counts, give validation and test; all other rows train"
            )
    elif not abs(sum(split.values()) - 1) <= 1e-6 or split.get("train", 0) <= 0:
        raise UserError(
            f"data.split: ratios {split} must add up to 1 with train above 0; for row counts give whole numbers, "
            "like {validation: 500, test: 500}"
        )


def assign_splits(hashes: np.ndarray, split: dict[str, float]) -> np.ndarray:
    """Assign each row to a split.

    Ratios: a threshold on the hash, stable when rows are added or reordered; sizes are approximate. Row counts: whole
    groups with the smallest hashes fill test, then validation, without exceeding the count.

    Args:
        hashes: ``group_hash`` of each row, uint64.
        split: As in ``check_split``.

    Returns:
        Index into ``SPLITS`` per row, int8.
    """
    if _is_counts(split):
        return _assign_counts(hashes, split)
    unit = hashes.astype(np.float64) / 2.0**64
    test, validation = split.get("test", 0.0), split.get("validation", 0.0)
    return np.where(unit < test, 2, np.where(unit < test + validation, 1, 0)).astype(np.int8)


def _assign_counts(hashes: np.ndarray, split: dict[str, float]) -> np.ndarray:
    assigned = np.zeros(len(hashes), dtype=np.int8)
    groups, group_of_row, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    side = np.zeros(len(groups), dtype=np.int8)
    for name in ("test", "validation"):
        left = int(split.get(name, 0))
        for group, size in enumerate(sizes):
            if left <= 0:
                break
            if side[group] == 0 and size <= left:
                side[group] = SPLITS.index(name)
                left -= int(size)
    assigned[:] = side[group_of_row]
    return assigned


def _is_counts(split: dict[str, float]) -> bool:
    return any(size > 1 for size in split.values())
