"""Documents of tokens -> rows of one length: long ones cut into pieces, pieces packed by best fit, a window at a time.

A piece never sees another one: the collator hands each out as a row of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

WINDOW = 20_000  # pieces packed together; more would fill rows hardly better


def cut_into_pieces(ids: list[int], length: int) -> list[list[int]]:
    """Cut a document so that each of its tokens but the first is predicted once.

    A piece begins with the last token of the one before: of 3 tokens, ``[1, 2, 3], [3, 4, 5]`` of ``[1, 2, 3, 4, 5]``.

    Args:
        ids: The document's tokens.
        length: Of a piece at most; 2 or more.

    Returns:
        Its pieces; none for a document of a single token, which nothing predicts.
    """
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack pieces into as few rows as best fit decreasing needs: each where the least space is left.

    Args:
        lengths: Tokens of each piece, none above ``capacity``.
        capacity: Tokens of a row.

    Returns:
        The pieces of each row, by their places in ``lengths``.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [
        [] for _ in range(capacity + 1)
    ]  # rows by the space they have left
    spaces = 0  # bit n: some row has n left
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        needed = lengths[piece]
        enough = spaces >> needed
        if enough:
            space = needed + (enough & -enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            row, space = len(rows), capacity
            rows.append([])
        rows[row].append(piece)
        left = space - needed
        with_space[left].append(row)
        spaces |= 1 << left
    return rows


@dataclass
class PackedRow:
    """Pieces that share a row.

    Args:
        pieces: Their tokens.
        documents: Where each comes from, by the document's number.
    """

    pieces: list[list[int]] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(map(len, self.pieces))


class Packer:
    """Packs documents into rows as they come, holding no more than a window of their pieces.

    Args:
        length: Tokens of a row at most.
        window: Pieces that are packed together; a row with none left to come is as full as it gets.
    """

    def __init__(self, length: int, window: int = WINDOW) -> None:
        self.length, self.window = length, window
        self._held: list[tuple[int, list[int]]] = []

    @property
    def is_empty(self) -> bool:
        """Whether all that was given has come out."""
        return not self._held

    def add(self, document: int, ids: list[int]) -> Iterator[PackedRow]:
        """Take a document by its number and tokens; give the rows that are done."""
        for piece in cut_into_pieces(ids, self.length):
            if len(piece) == self.length:
                yield PackedRow([piece], [document])
            else:
                self._held.append((document, piece))
        if len(self._held) >= self.window:
            yield from self.rest()

    def rest(self) -> Iterator[PackedRow]:
        """Give the rows of all that is held."""
        held, self._held = self._held, []
        for row in best_fit([len(piece) for _, piece in held], self.length):
            yield PackedRow([held[i][1] for i in row], [held[i][0] for i in row])
