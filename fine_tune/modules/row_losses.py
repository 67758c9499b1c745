"""The loss of each row of a split, of all ranks together: by it two models are compared row by row."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fine_tune.ranks import from_all_ranks


class RowLosses:
    """Collects each row's id, what its loss is divided by (supervised tokens, or 1 for a pair), and its summed loss."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._counts: list[int] = []
        self._losses: list[Tensor] = []

    def update(self, row_ids: Sequence[int], counts: Sequence[int], losses_R: Tensor) -> None:
        """Add rows.

        Args:
            row_ids: Of the rows.
            counts: What each row's loss is divided by.
            losses_R: Each row's loss, summed.
        """
        self._ids += row_ids
        self._counts += counts
        self._losses.append(losses_R.detach().float())

    def take(self, world_size: int) -> np.ndarray:
        """Return ``[R, 3]`` by ascending id, id, count and loss of all ranks' rows, and forget them; on every rank."""
        losses_R = torch.cat(self._losses).cpu().numpy() if self._losses else np.zeros(0)
        mine_R3 = np.stack([self._ids, self._counts, losses_R], 1).astype(np.float64)
        self._ids, self._counts, self._losses = [], [], []
        all_R3 = np.concatenate(from_all_ranks(mine_R3, world_size))
        return all_R3[all_R3[:, 0].argsort(kind="stable")]
