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
