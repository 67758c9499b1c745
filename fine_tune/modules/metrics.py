"""Evaluation metrics: sums over all tokens of a split, so that no batch size changes them."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMetrics(Metric):
    """Loss, perplexity and token accuracy over the supervised tokens of a split, all ranks together.

    Sums are kept in float64 (float32 on devices without it).
    """

    full_state_update = False
    nll_sum: Tensor
    num_tokens: Tensor
    num_correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("nll_sum", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll_N: Tensor, num_correct: Tensor) -> None:
        """Add one micro-batch: the NLL of each supervised token in nats, and how many were the likeliest."""
        self.nll_sum += nll_N.to(self.nll_sum.dtype).sum()
        self.num_tokens += len(nll_N)
        self.num_correct += num_correct

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` (nats per token), ``perplexity`` (inf past the largest float), ``token_accuracy``."""
        loss = self.nll_sum / self.num_tokens
        return {
            "loss": loss,
            "perplexity": torch.exp(loss),
            "token_accuracy": self.num_correct / self.num_tokens,
        }


PREFERENCE_METRICS = (
    "rewards_chosen",
    "rewards_rejected",
    "rewards_accuracy",
    "rewards_margin",
    "logps_chosen",
    "logps_rejected",
)
ACCURACY_INTERVAL = ("rewards_accuracy_low", "rewards_accuracy_high")


class PreferenceMetrics(Metric):
    """Means over the pairs of a split, all ranks together, and the 95 % interval of the accuracy.

    Sums are kept in float64 (float32 on devices without it), so that no batch size changes them.

    Args:
        names: What is measured of a pair beside its loss; ``rewards_accuracy`` among them.
    """

    full_state_update = False
    sums: Tensor
    num_pairs: Tensor

    def __init__(self, names: tuple[str, ...] = PREFERENCE_METRICS) -> None:
        super().__init__()
        self.names = names
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        zeros = torch.zeros(1 + len(names), dtype=wide)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("num_pairs", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_B: Tensor, *measured: Tensor) -> None:
        """Add pairs: their losses, and what ``names`` names, one value each."""
        values = torch.stack([loss_B, *measured]).to(self.sums.dtype)
        self.sums += values.sum(1)
        self.num_pairs += len(loss_B)

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss``, ``names`` and ``ACCURACY_INTERVAL`` (Wilson's, of 95 %)."""
        means = dict(zip(("loss", *self.names), self.sums / self.num_pairs, strict=True))
        interval = wilson_interval(means["rewards_accuracy"], self.num_pairs)
        return {**means, **dict(zip(ACCURACY_INTERVAL, interval, strict=True))}


def wilson_interval(share: Tensor, count: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor]:
    """Return the 95 % interval of a share of ``count`` draws (Wilson, 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count)
    spread = spread * torch.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - spread, middle + spread
