"""A curriculum: documents sorted by what it goes by before they are packed, so that a row holds what is alike.

Packed first, each row would mix short and long ones, and there would be little left to sort.
"""

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fine_tune.data.documents import Document
from fine_tune.data.text_rows import WINDOW
from fine_tune.errors import UserError

WINDOWS, SMALLEST_WINDOW = 30, 50


def difficulty_of(document: Document, sorted_by: str, num_tokens: int) -> float:
    """Return what a document is sorted by.

    Args:
        document: With the fields of its row.
        sorted_by: ``length``, or a field.
        num_tokens: Of the document.

    Raises:
        UserError: The field is no number.
    """
    if sorted_by == "length":
        return float(num_tokens)
    value: Any = document.fields.get(sorted_by)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # a text, in a CSV
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{document.where}: '{sorted_by}' is no number ({value!r}); data.curriculum_field must be one in every row"
        )
    return number


class DocumentSorter:
    """Documents of tokens that wait on the disk until all have come; memory holds 24 bytes of each.

    Args:
        file: Where their tokens wait.
        handle: The same file, open to be written.
    """

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file, self.handle = file, handle
        self._numbers, self._difficulties, self._ends = array("q"), array("d"), array("q", [0])

    @property
    def window(self) -> int:
        """Documents packed together: a thirtieth of them, so that those of a row are neighbours in the order."""
        return min(WINDOW, max(SMALLEST_WINDOW, len(self._numbers) // WINDOWS))

    def add(self, document: int, ids: list[int], difficulty: float) -> None:
        """Take a document by its number and tokens."""
        self.handle.write(np.array(ids, dtype=np.int32).tobytes())
        self._numbers.append(document)
        self._difficulties.append(difficulty)
        self._ends.append(self._ends[-1] + len(ids))

    def easiest_first(self) -> Iterator[tuple[int, list[int], float]]:
        """Give back all that was taken, sorted; equals as they came."""
        self.handle.flush()
        if not self._numbers:
            return
        tokens = np.memmap(self.file, dtype=np.int32, mode="r")
        for i in np.argsort(np.frombuffer(self._difficulties), kind="stable"):
            ids = tokens[self._ends[i] : self._ends[i + 1]].tolist()
            yield self._numbers[i], ids, self._difficulties[i]
