"""The sealed test split: preparation writes it apart, and only ``test`` (or the end of ``fit``) opens it.

Its identity is what its rows say, whatever model, tokenizer or template reads them, so that openings are counted for
the data and not for one way to look at it.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from fine_tune.data.content import own_words
from fine_tune.data.files import rows_of
from fine_tune.data.parts import Part
from fine_tune.errors import UserError
from fine_tune.runs.openings import OPENINGS_FILE, read_openings

SEALED = (
    "the test split is sealed while a model is trained; it is opened by test, and by fit --test_at_end true after the "
    "last step"
)
ROWS_FILE = (
    "rows.json"  # digests of the rows, to see which were opened before as part of another split
)


def row_digests(parts: Iterable[Part]) -> list[str]:
    """Return the digest of what each row says, sorted, so that their order does not matter."""
    return sorted(
        hashlib.sha256(
            repr(own_words(row, part.format_name, part.source.templates)).encode("utf-8", "replace")
        ).hexdigest()[:16]
        for part in parts
        for start in range(0, len(part.rows), 1000)
        for row in rows_of(part.rows[start : start + 1000])
    )


@dataclass
class SealedTest:
    """A test split on disk.

    Args:
        folder: ``<cache>/test_splits/<hash>``, the same for every way to encode its rows.
        key: The way they are encoded here.
        digest: Of the encoded rows, to see that nobody changed them.
        locked: Whether a model is being trained.
        opening: The newest opening by this process: its id, time and the rows' identity.
    """

    folder: Path
    key: str
    digest: str
    locked: bool = False
    opening: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """The identity of the rows."""
        return self.folder.name

    @classmethod
    def write(cls, root: Path, rows: Dataset, row_digests: list[str], key: str) -> dict[str, str]:
        """Write encoded test rows apart; return what ``at`` finds them by."""
        folder = root / hashlib.sha256("".join(row_digests).encode()).hexdigest()[:32]
        unfinished = folder / f"{key}.unfinished-{os.getpid()}"
        rows.save_to_disk(str(unfinished))
        digest = _digest(load_from_disk(str(unfinished)))
        (folder / ROWS_FILE).write_text(json.dumps(row_digests))
        shutil.rmtree(folder / key, ignore_errors=True)
        unfinished.rename(folder / key)
        return {"test_hash": folder.name, "test_digest": digest}

    @classmethod
    def at(cls, root: Path, facts: dict[str, Any], key: str) -> "SealedTest | None":
        """Find the sealed split of some prepared data; None if it has no test split.

        Raises:
            OSError: It is not where it was written.
        """
        if "test_hash" not in facts:
            return None
        sealed = cls(root / facts["test_hash"], key, facts["test_digest"])
        if not (sealed.folder / key).is_dir():
            raise FileNotFoundError(sealed.folder / key)
        return sealed

    def open(self, *, counted: bool = True) -> Dataset:
        """Return the rows, and note that they were opened.

        Args:
            counted: False on all processes of a run but its first.

        Raises:
            UserError: A model is being trained, or they are not those that were sealed.
        """
        if self.locked:
            raise UserError(f"data: {SEALED}")
        try:
            rows = load_from_disk(str(self.folder / self.key))
            same = _digest(rows) == self.digest
        except (OSError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"{self.folder / self.key}: the sealed test split was changed since it was prepared; delete that "
                "folder, and it is prepared anew from the data"
            )
        if counted:
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            self.opening = {"id": uuid.uuid4().hex, "time": now, "test_hash": self.hash}
            self.note_opening(self.opening)
        return rows

    def note_opening(self, opening: dict[str, Any]) -> None:
        """Append an opening, or its result, to what is known of this split."""
        with open(self.folder / OPENINGS_FILE, "a") as handle:
            handle.write(json.dumps(opening) + "\n")

    def openings(self) -> list[dict[str, Any]]:
        """List what was noted of openings, oldest first."""
        return read_openings(self.folder)

    def rows_opened_before(self) -> int:
        """Count the rows of this split that were opened as part of another one."""
        mine, seen = set(json.loads((self.folder / ROWS_FILE).read_text())), set()
        for other in self.folder.parent.iterdir():
            if other != self.folder and (other / OPENINGS_FILE).is_file():
                seen |= set(json.loads((other / ROWS_FILE).read_text()))
        return len(mine & seen)


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for name in (name for name in ("input_ids", "labels", "pieces") if name in rows.column_names):
        column = rows.data.column(name)
        digest.update(pc.list_value_length(column).to_numpy().tobytes())
        digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()
