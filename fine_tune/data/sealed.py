"""The sealed test split: preparation writes it apart, and only ``test`` (or the end of ``fit``) opens it.

Its hash is the identity of its rows, whatever model, tokenizer or template reads them, so that openings are counted
for the data and not for one way to look at it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from fine_tune.data.files import rows_of
from fine_tune.data.parts import Part
from fine_tune.errors import UserError


def test_rows_hash(parts: Iterable[Part]) -> str:
    """Hash the content of raw rows: SHA-256 over their sorted digests, so their order does not matter."""
    digests = sorted(
        hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
        for part in parts
        for start in range(0, len(part.rows), 1000)
        for row in rows_of(part.rows[start : start + 1000])
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def seal(rows: Dataset, folder: Path) -> str:
    """Write encoded test rows apart; return the digest that opening them is held against."""
    rows.save_to_disk(str(folder))
    return _digest(load_from_disk(str(folder)))


def open_sealed(folder: Path, digest: str) -> Dataset:
    """Open the sealed test split.

    Raises:
        UserError: Its rows are not those that were sealed.
    """
    rows = load_from_disk(str(folder))
    if _digest(rows) != digest:
        raise UserError(
            f"{folder}: the sealed test split was changed since it was prepared; delete that folder, "
            "and it is prepared anew from the data"
        )
    return rows


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        column = rows.data.column(name)
        digest.update(pc.list_value_length(column).to_numpy().tobytes())
        digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()
