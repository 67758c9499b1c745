"""What is told of packed texts: counts per split, how full rows are, documents that repeat an earlier one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fine_tune.data.audit import length_statistics
from fine_tune.data.encode_rows import column, token_counts
from fine_tune.data.leakage import Leakage

HASH_BYTES = 8
COMPARED_AT_ONCE = 2**20


def count_repeated(hashes: Path) -> int:
    """Count documents that repeat an earlier one, with the disk instead of memory: the file is sorted where it lies.

    Args:
        hashes: A file of 8 bytes for each document, equal where the documents are; sorted afterwards.
    """
    count = hashes.stat().st_size // HASH_BYTES
    if count == 0:
        return 0
    sorted_N = np.memmap(hashes, dtype=np.uint64, mode="r+", shape=(count,))
    sorted_N.sort()
    repeated = 0
    for start in range(0, count - 1, COMPARED_AT_ONCE):
        part = sorted_N[start : start + COMPARED_AT_ONCE + 1]
        repeated += int((part[1:] == part[:-1]).sum())
    return repeated


def text_facts(
    rows: dict[str, Dataset], told: Iterable[str], num_bytes: dict[str, int], repeated: int
) -> dict[str, Any]:
    """Return the notes and the audit of packed rows, in the words rows of examples have.

    Args:
        rows: Per split.
        told: Lines about them that come first.
        num_bytes: Of the documents of each split.
        repeated: Training documents that repeat an earlier one.
    """
    notes, audited = list(told), {}
    for name, of_split in rows.items():
        length = length_statistics(token_counts(of_split))
        short = {key: length[key] for key in ("mean", "median", "p95", "max")}
        audited[name] = {"length": short, "supervised_length": short, "sources": {}, "strata": {}}
    if repeated:
        notes.append(f"train: {repeated:,} documents repeat an earlier one, word for word")
    train, supervised = token_counts(rows["train"]), column(rows["train"], "num_supervised")
    audit = {
        "rows": {name: len(of_split) for name, of_split in rows.items()},
        "too_long_rows": 0,
        "empty_completions": 0,
        "tokens": int(train.sum()),
        "supervised_tokens": int(supervised.sum()),
        "length": length_statistics(train),
        "longest_sequence": int(train.max()),
        "supervised_length": length_statistics(supervised),
        "truncated_rows_share": 0.0,
        "supervised_tokens_lost_share": 0.0,
        "preferences": {},
        "repeated_rows": {"repeated": repeated, "near": 0},
        "leakage": Leakage(1.0).as_dict(),
        "splits": audited,
        "drift": {},
    }
    return {"notes": notes, "audit": audit, "num_bytes": num_bytes}
