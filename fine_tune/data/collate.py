"""Rows of one step -> ``SFTBatch``: longest first, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fine_tune.batches import SFTBatch
from fine_tune.losses import IGNORE_INDEX, num_supervised_targets


@dataclass
class SFTCollator:
    """Turn encoded rows into one batch.

    Args:
        pad_token_id: Fills ``input_ids`` behind a row's end; its labels carry no loss whatever the id is.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> SFTBatch:
        rows = sorted(rows, key=lambda row: (-len(row["input_ids"]), row["row_id"]))
        longest = len(rows[0]["input_ids"]) if rows else 0
        input_ids_BT = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)
        labels_BT = torch.full((len(rows), longest), IGNORE_INDEX, dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids_BT[i, :length] = torch.as_tensor(row["input_ids"])
            labels_BT[i, :length] = torch.as_tensor(row["labels"])
        return SFTBatch(
            input_ids_BT=input_ids_BT,
            labels_BT=labels_BT,
            lengths=[len(row["input_ids"]) for row in rows],
            num_supervised=[num_supervised_targets(list(row["labels"])) for row in rows],
            row_ids=[int(row["row_id"]) for row in rows],
        )
