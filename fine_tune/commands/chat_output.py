"""What a chat shows: whole characters, none that steers the terminal, two answers side by side."""

import unicodedata
from typing import Any

from rich.table import Table
from rich.text import Text

from fine_tune.printable import JOINERS, printable

NARROW = 80  # columns; below it two answers stand one above the other
SIDES = ("before this run", "after it")


def shown(text: str) -> str:
    """Return text that cannot steer a terminal: control characters written out, any space a space."""
    plain = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    return printable(plain, keep="\n\t" + JOINERS)


class TokenText:
    """The text of tokens as they come, in whole characters.

    A character may take several tokens: as long as the text ends with half of one, it is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._start = self._read = 0

    def more(self, ids: list[int], *, ended: bool = False) -> str:
        """Return what is new since the last call.

        Args:
            ids: All tokens so far.
            ended: None follow: what is left of half a character comes too.
        """
        before = self._decode(ids[self._start : self._read])
        now = self._decode(ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not ended):
            return ""
        self._start, self._read = self._read, len(ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def side_by_side(texts: list[str], width: int) -> Table:
    """Lay two answers out beside each other, or one above the other in a narrow terminal."""
    answers = [Text(shown(text).replace("\ufffd", "?")) for text in texts]
    if width < NARROW:
        table = Table(show_header=False, show_lines=True, width=width)
        table.add_column(overflow="fold")
        for title, answer in zip(SIDES, answers, strict=True):
            table.add_row(Text(f"{title}:\n").append_text(answer))
        return table
    table = Table(width=width)
    for title in SIDES:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*answers)
    return table
