"""The log-probabilities of both answers of a pair.

Shape letters: B pairs, T tokens, N predicted tokens, 2 answers (chosen, rejected).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fine_tune.batches import PreferenceBatch, on_device
from fine_tune.losses import IGNORE_INDEX, nll_per_token
from fine_tune.modules.lm_head import head_at, nll_in_chunks
from fine_tune.modules.pairs import pair_inputs


class PairLogps(NamedTuple):
    """Log-probabilities of answers.

    ``head_B2`` sums the tokens up to the length of the shorter answer, ``tail_B2`` those behind it (LD-DPO,
    arXiv 2409.06411, weighs them differently); ``num_tokens_B2`` counts both.
    """

    head_B2: Tensor
    tail_B2: Tensor
    num_tokens_B2: Tensor

    def weighted(self, ld_alpha: float) -> Tensor:
        """Return the log-probability of each answer, its tail weighed by ``ld_alpha``."""
        return self.head_B2 + ld_alpha * self.tail_B2


class _Targets(NamedTuple):
    rows_N: Tensor
    positions_N: Tensor  # in the pair's row, of the token that predicts
    tokens_N: Tensor
    sides_N: Tensor
    ranks_N: Tensor  # how many predicted tokens of the answer come before


def pair_logps(
    model: Any, batch: PreferenceBatch, *, shared: bool, at_once: int | None = None
) -> PairLogps:
    """Compute the log-probabilities of both answers of each pair.

    Args:
        model: A causal language model.
        batch: Pairs; see ``PreferenceBatch``.
        shared: See ``pair_inputs``.
        at_once: Tokens whose logits may lie in memory; None for all.
    """
    inputs, place = pair_inputs(model, batch, shared=shared)
    targets = _targets(batch)
    positions_N = place(targets.rows_N, targets.positions_N, targets.sides_N)
    if at_once is None:
        with head_at(model, positions_N):
            logits = model(**inputs, use_cache=False).logits.squeeze(0)
        nll_N = nll_per_token(logits, targets.tokens_N)
    else:
        nll_N = nll_in_chunks(model, inputs, positions_N, targets.tokens_N, at_once)
    return _summed(-nll_N, targets, len(batch["lengths"]))


def _targets(batch: PreferenceBatch) -> _Targets:
    labels_BT = batch["labels_BT"]
    num_prompt_B, num_chosen_B = (
        on_device(batch[name], labels_BT.device) for name in ("num_prompt", "num_chosen")
    )
    num_targets = sum(batch["num_supervised"])
    found_N2 = torch.nonzero_static(labels_BT != IGNORE_INDEX, size=num_targets)
    rows_N, at_N = found_N2.unbind(1)
    second_N = num_prompt_B[rows_N] + num_chosen_B[rows_N]  # where the rejected answer begins
    sides_N = (at_N >= second_N).long()
    predicting_N = torch.where(at_N == second_N, num_prompt_B[rows_N], at_N) - 1
    groups_N = 2 * rows_N + sides_N  # in ascending order
    counts = _counts(groups_N, 2 * len(labels_BT))
    first_N = (counts.cumsum(0) - counts)[groups_N]
    ranks_N = torch.arange(len(at_N), device=at_N.device) - first_N
    return _Targets(rows_N, predicting_N, labels_BT[rows_N, at_N], sides_N, ranks_N)


def _summed(logps_N: Tensor, targets: _Targets, num_pairs: int) -> PairLogps:
    groups_N = 2 * targets.rows_N + targets.sides_N
    counts = _counts(groups_N, 2 * num_pairs).view(num_pairs, 2)
    in_head_N = targets.ranks_N < counts.min(1).values[targets.rows_N]
    # sums of hundreds of tokens are soon subtracted from one another: in float64 where the device has it
    wide = logps_N.dtype if logps_N.device.type == "mps" else torch.float64
    logps_N, empty = logps_N.to(wide), torch.zeros(2 * num_pairs, dtype=wide, device=logps_N.device)
    head, tail = (
        empty.index_add(0, groups_N, logps_N * chosen_N).view(num_pairs, 2)
        for chosen_N in (in_head_N, ~in_head_N)
    )
    return PairLogps(head, tail, counts)


def _counts(groups_N: Tensor, num_groups: int) -> Tensor:
    """Count how often each group stands; ``bincount`` would wait for a GPU."""
    empty = torch.zeros(num_groups, dtype=torch.long, device=groups_N.device)
    return empty.scatter_add(0, groups_N, torch.ones_like(groups_N))
