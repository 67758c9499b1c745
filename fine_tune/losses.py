"""Losses as pure functions: they return sums and counts, never a mean; the step divides once.

Shape letters: B batch, T time, V vocabulary, N supervised positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def supervised_targets(labels_BT: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """Find the positions that predict a supervised token, and those tokens.

    Args:
        labels_BT: Aligned with the inputs, not shifted; ``IGNORE_INDEX`` carries no loss.
        num_targets: How many there are, as the host knows (``num_supervised_targets``): a GPU is not waited for.

    Returns:
        ``positions_N`` into the flattened ``[B * T]`` hidden states and ``targets_N``, the next token at each.
    """
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions_N = torch.nonzero_static(next_BT != IGNORE_INDEX, size=num_targets).squeeze(1)
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


# ---- preferences: one loss per pair, from the log-probabilities of its answers under policy and reference


def sigmoid_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with ``label_smoothing`` the share of pairs labelled wrongly, cDPO.

    ``-(1 - e) log sigmoid(beta (c - r)) - e log sigmoid(-beta (c - r))``

    Args:
        chosen_B: log policy over reference of the chosen answers.
        rejected_B: The same of the rejected ones.
        beta: How strongly the policy is held to the reference.
        label_smoothing: e, from 0 up to 0.5.
    """
    margin_B = beta * (chosen_B - rejected_B)
    flipped_B = label_smoothing * F.logsigmoid(-margin_B)
    return -(1 - label_smoothing) * F.logsigmoid(margin_B) - flipped_B


def robust_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Robust DPO (arXiv 2403.00409, eq. 12): DPO's loss, unbiased under labels flipped at the rate e."""
    margin_B = beta * (chosen_B - rejected_B)
    kept_B = -(1 - label_smoothing) * F.logsigmoid(margin_B)
    return (kept_B + label_smoothing * F.logsigmoid(-margin_B)) / (1 - 2 * label_smoothing)


def hinge_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin (arXiv 2305.10425, 2309.06657): ``max(0, 1 - beta (c - r))``."""
    return torch.relu(1 - beta * (chosen_B - rejected_B))


def ipo_loss(chosen_mean_B: Tensor, rejected_mean_B: Tensor, *, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): ``(c - r - 1 / (2 beta))^2`` of log ratios per token, as its authors ran it."""
    return (chosen_mean_B - rejected_mean_B - 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): ``1 - sigmoid(beta c) + sigmoid(beta r)``."""
    return 1 - torch.sigmoid(beta * chosen_B) + torch.sigmoid(beta * rejected_B)


def apo_down_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): ``sigmoid(beta c) + 1 - sigmoid(beta (c - r))``."""
    return torch.sigmoid(beta * chosen_B) + 1 - torch.sigmoid(beta * (chosen_B - rejected_B))


def simpo_loss(
    chosen_mean_B: Tensor, rejected_mean_B: Tensor, *, beta: float, margin: float
) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): ``-log sigmoid(beta (c - r) - margin)`` of log-probabilities per token."""
    return -F.logsigmoid(beta * (chosen_mean_B - rejected_mean_B) - margin)


def orpo_loss(chosen_mean_B: Tensor, rejected_mean_B: Tensor, *, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): NLL per token of the chosen answer, and beta times the odds-ratio loss.

    ``-c - beta log sigmoid(log odds(c) - log odds(r))`` with ``log odds(c) = c - log(1 - exp(c))``, c and r
    log-probabilities per token.
    """
    odds_B = chosen_mean_B - rejected_mean_B
    odds_B = odds_B - (_log1mexp(chosen_mean_B) - _log1mexp(rejected_mean_B))
    return -chosen_mean_B - beta * F.logsigmoid(odds_B)


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, margins_B: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """Bradley-Terry: ``-log sigmoid(c - r - m) + center (c + r)^2`` of two rewards.

    The margin m is Llama 2's (arXiv 2307.09288, eq. 2), the second term that of arXiv 2312.09244.
    """
    return -F.logsigmoid(chosen_B - rejected_B - margins_B) + center * (chosen_B + rejected_B) ** 2


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x below 0, kept finite at 0."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
