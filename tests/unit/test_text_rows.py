"""Documents become rows of one length: nothing lost, nothing twice, hardly anything empty."""

import random
import tracemalloc
from pathlib import Path

import pytest

from fine_tune.data.text_order import DocumentSorter
from fine_tune.data.text_rows import Packer, best_fit, cut_into_pieces


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([1, 2, 3, 4, 5], [[1, 2, 3], [3, 4, 5]]),
        ([1, 2, 3, 4], [[1, 2, 3], [3, 4]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([1, 2], [[1, 2]]),
        ([1], []),
        ([], []),
    ],
)
def test_pieces_overlap_by_one_token(ids: list[int], pieces: list[list[int]]) -> None:
    assert cut_into_pieces(ids, 3) == pieces


def test_a_piece_goes_where_the_least_space_is_left() -> None:
    # 7 and 6 open rows with 3 and 4 left; 4 fills the second, 3 the first; 2 needs a row of its own
    assert best_fit([3, 7, 4, 6, 2], 10) == [[1, 0], [3, 2], [4]]


def test_every_token_is_predicted_once_and_rows_are_full() -> None:
    draw = random.Random(0)
    documents = [
        (n, [draw.randrange(1000) for _ in range(int(draw.expovariate(1 / 60)) + 2)])
        for n in range(3_000)
    ]
    packer = Packer(128, window=500)
    rows = [row for document in documents for row in packer.add(*document)] + list(packer.rest())
    predicted: dict[int, list[int]] = {n: [] for n, _ in documents}
    for row in rows:
        assert row.num_tokens <= 128
        for piece, document in zip(row.pieces, row.documents, strict=True):
            predicted[document].append(len(piece) - 1)
    for n, ids in documents:
        assert sum(predicted[n]) == len(ids) - 1
    assert sum(row.num_tokens for row in rows) / (128 * len(rows)) > 0.98


def test_no_more_than_a_window_is_held() -> None:
    packer = Packer(8, window=10)
    given = [len(list(packer.add(n, [1, 2, 3]))) for n in range(30)]
    assert [n for n, rows in enumerate(given) if rows] == [9, 19, 29]
    assert list(packer.rest()) == []


def test_documents_are_sorted_in_little_memory(tmp_path: Path) -> None:
    count = 100_000
    with (tmp_path / "unsorted").open("wb") as handle:
        sorter = DocumentSorter(tmp_path / "unsorted", handle)
        for number in range(count):
            sorter.add(number, [number, 0], float(-number))
        tracemalloc.start()
        try:
            documents = sorter.easiest_first()
            first, second = next(documents), next(documents)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (first[:2], second[:2]) == ((count - 1, [count - 1, 0]), (count - 2, [count - 2, 0]))
    assert peak / count < 24  # beside the sorter's own
