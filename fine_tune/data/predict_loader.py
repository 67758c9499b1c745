"""Rows to predict, handed out longest first, and the plan of a run that takes no steps."""

import sys
from collections.abc import Iterator

import numpy as np

from fine_tune.batches import DataPlan, PredictBatch
from fine_tune.data.predict_rows import PredictRows

ITEMS_PER_BATCH = 4_096  # the module takes in what fits; a batch only ends with fewer rows than fit


class PredictLoader:
    """Batches of rows, longest first.

    Args:
        rows: All rows of the file.
        done: Rows that have their result already.
    """

    def __init__(self, rows: PredictRows, done: set[int]) -> None:
        self.rows = rows
        lengths = [len(item.input_ids) for item in rows.items]
        left = [i for i, item in enumerate(rows.items) if item.row not in done]
        self._order = sorted(left, key=lambda i: -lengths[i])

    def __len__(self) -> int:
        return -(-len(self._order) // ITEMS_PER_BATCH)

    def __iter__(self) -> Iterator[PredictBatch]:
        for start in range(0, len(self._order), ITEMS_PER_BATCH):
            items = self._order[start : start + ITEMS_PER_BATCH]
            ids = [np.asarray(self.rows.items[i].input_ids) for i in items]
            yield PredictBatch(
                items=items,
                ids=ids,
                lengths=[len(of_row) for of_row in ids],
                stop_ids=sorted(self.rows.stop_ids),
            )


def predict_plan(rows: PredictRows, max_new_tokens: int, max_tokens: int | None) -> DataPlan:
    """Plan for rows that are only predicted.

    Args:
        rows: All of them.
        max_new_tokens: Tokens an answer may have.
        max_tokens: Padded tokens per forward pass, as the user set it.
    """
    lengths = [len(item.input_ids) for item in rows.items]
    longest = max(lengths) + max_new_tokens
    return DataPlan(
        num_rows={"predict": len(rows.lines)},
        num_tokens={"predict": sum(lengths)},
        num_supervised={"predict": 0},
        longest_row={"predict": longest},
        max_length=longest,
        batch_size=len(lengths),
        max_tokens_per_micro_batch=max_tokens,
        steps_per_epoch=1,
        num_steps=0,
        planned_steps=sys.maxsize,  # no warm-up is too long for it
        largest_token_id=max(max(item.input_ids) for item in rows.items),
    )
