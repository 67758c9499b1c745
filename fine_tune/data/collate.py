"""Rows of one step -> ``SFTBatch``: longest first, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_tune.batches import PreferenceBatch, SFTBatch
from fine_tune.losses import IGNORE_INDEX, num_supervised_targets


@dataclass
class SFTCollator:
    """Turn encoded rows into one batch.

    Args:
        pad_token_id: Fills ``input_ids`` behind a row's end; its labels carry no loss whatever the id is.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> SFTBatch:
        rows = longest_first(rows)
        input_ids_BT, labels_BT = padded(rows, self.pad_token_id)
        return SFTBatch(
            input_ids_BT=input_ids_BT,
            labels_BT=labels_BT,
            lengths=[len(row["input_ids"]) for row in rows],
            num_supervised=[num_supervised_targets(list(row["labels"])) for row in rows],
            row_ids=[int(row["row_id"]) for row in rows],
        )


@dataclass
class PreferenceCollator:
    """Turn encoded pairs into one batch.

    Args:
        pad_token_id: Fills ``input_ids`` behind a row's end.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PreferenceBatch:
        rows = longest_first(rows)
        input_ids_BT, labels_BT = padded(rows, self.pad_token_id)
        return PreferenceBatch(
            input_ids_BT=input_ids_BT,
            labels_BT=labels_BT,
            lengths=[len(row["input_ids"]) for row in rows],
            num_prompt=[int(row["num_prompt"]) for row in rows],
            num_chosen=[int(row["num_chosen"]) for row in rows],
            num_supervised=[
                int(np.count_nonzero(np.asarray(row["labels"]) != IGNORE_INDEX)) for row in rows
            ],
            margins=[float(row["margin"]) for row in rows],
            row_ids=[int(row["row_id"]) for row in rows],
        )


@dataclass
class TextCollator:
    """Turn packed rows into one batch of their pieces: each is a row of its own, and sees no other.

    Args:
        pad_token_id: Fills ``input_ids`` behind a piece's end.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> SFTBatch:
        pieces = []
        for row in rows:
            ends = np.cumsum(row["pieces"])
            pieces += [
                {"input_ids": ids, "labels": ids, "row_id": row["row_id"]}
                for ids in np.split(np.asarray(row["input_ids"]), ends[:-1])
            ]
        return SFTCollator(self.pad_token_id)(pieces)


def longest_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order rows by their length, the longest first; rows of one length by their ids."""
    return sorted(rows, key=lambda row: (-len(row["input_ids"]), row["row_id"]))


def padded(rows: Sequence[dict[str, Any]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ``input_ids_BT`` and ``labels_BT`` of rows, the longest first."""
    longest = len(rows[0]["input_ids"]) if rows else 0
    input_ids_BT = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORE_INDEX, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids_BT[i, :length] = torch.as_tensor(row["input_ids"])
        labels_BT[i, :length] = torch.as_tensor(row["labels"])
    return input_ids_BT, labels_BT
