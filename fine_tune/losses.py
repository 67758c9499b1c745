"""Losses as pure functions: they return sums and counts, never a mean; the step divides once.

Shape letters: B batch, T time, V vocabulary, N supervised positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def supervised_targets(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Find the positions that predict a supervised token, and those tokens.

    Args:
        labels_BT: Aligned with the inputs, not shifted; ``IGNORE_INDEX`` carries no loss.

    Returns:
        ``positions_N`` into the flattened ``[B * T]`` hidden states and ``targets_N``, the next token at each.
    """
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions_N = torch.nonzero(next_BT != IGNORE_INDEX).squeeze(1)
    return positions_N, next_BT[positions_N]


def num_supervised_targets(labels: list[int]) -> int:
    """Count the tokens of one row that carry loss (its first token has nothing before it to predict it)."""
    return sum(1 for label in labels[1:] if label != IGNORE_INDEX)


def nll_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum the negative log-likelihood of the targets, in nats, in float32 or wider.

    For training; ``nll_per_token`` summed in float64 measures an evaluation split whatever its batches.

    Args:
        logits_NV: Unnormalised scores, one row per supervised position.
        targets_N: The token each row should give.

    Returns:
        A scalar: ``-sum_n log softmax(logits_n)[target_n]``.
    """
    logits_NV = (
        logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
    )
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def nll_per_token(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, in nats, shape ``[N]``."""
    return F.cross_entropy(_wide(logits_NV), targets_N, reduction="none")


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
