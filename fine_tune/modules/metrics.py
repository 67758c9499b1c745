"""Evaluation metrics: sums over all tokens of a split, so that no batch size changes them; and how sure they are.

Shape letters: N supervised tokens, R rows, B pairs.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMetrics(Metric):
    """Loss, perplexity and token accuracy over the supervised tokens of a split, all ranks together.

    Their 95 % intervals take rows as drawn, not tokens, which are alike within a row. Sums are kept in float64
    (float32 on devices without it).
    """

    full_state_update = False
    nll_sum: Tensor
    num_tokens: Tensor
    num_correct: Tensor
    num_rows: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("nll_sum", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # of each row's tokens, NLL and correct tokens, two at a time
        self.add_state("products", torch.zeros(3, 3, dtype=wide), dist_reduce_fx="sum")

    def update(self, nll_N: Tensor, correct_N: Tensor, row_lengths: list[int]) -> None:
        """Add one micro-batch: all of it, or none where memory runs out.

        Args:
            nll_N: The NLL of each supervised token in nats.
            correct_N: Whether it was the likeliest.
            row_lengths: Supervised tokens of each row, in the order of the tokens.
        """
        wide_N = nll_N.to(self.nll_sum.dtype)
        tokens_N3 = torch.stack([torch.ones_like(wide_N), wide_N, correct_N.to(wide_N.dtype)], 1)
        rows_R3 = torch.stack([row_N3.sum(0) for row_N3 in tokens_N3.split(row_lengths)])
        nll_sum, num_correct, products = wide_N.sum(), correct_N.sum(), rows_R3.T @ rows_R3
        self.nll_sum += nll_sum
        self.num_tokens += len(nll_N)
        self.num_correct += num_correct
        self.num_rows += len(row_lengths)
        self.products += products

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` (nats per token), ``perplexity`` (inf past the largest float), ``token_accuracy``.

        Beside each its 95 % interval, ``_low`` and ``_high``; NaN of a single row.
        """
        loss, accuracy = self.nll_sum / self.num_tokens, self.num_correct / self.num_tokens
        error = self._error(1, loss)
        low, high = (loss - Z_95 * error).clamp(min=0), loss + Z_95 * error
        # as many independent draws as would spread as widely; of none or all right, no more than rows
        wide = accuracy.to(self.products.dtype)
        draws = wide * (1 - wide) / self._error(2, wide) ** 2
        draws = torch.where(draws.isfinite() & (draws > 0), draws, self.num_rows)
        accuracy_low, accuracy_high = wilson_interval(wide, draws.clamp(max=self.num_tokens))
        return {
            "loss": loss,
            "loss_low": low,
            "loss_high": high,
            "perplexity": torch.exp(loss),
            "perplexity_low": torch.exp(low),
            "perplexity_high": torch.exp(high),
            "token_accuracy": accuracy,
            "token_accuracy_low": accuracy_low,
            "token_accuracy_high": accuracy_high,
        }

    def _error(self, of: int, ratio: Tensor) -> Tensor:
        """Return the standard error of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.3)."""
        products = self.products
        spread = products[of, of] - 2 * ratio * products[of, 0] + ratio**2 * products[0, 0]
        return (
            torch.sqrt(spread.clamp(min=0) * self.num_rows / (self.num_rows - 1)) / self.num_tokens
        )


class ByteMetrics(TokenMetrics):
    """The same, and the loss in bits per byte of text, which no tokenizer changes the meaning of."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_per_byte = math.nan  # predicted tokens of the split over its bytes

    def compute(self) -> dict[str, Tensor]:
        """Return also ``bits_per_byte``: ``loss / ln 2`` times the predicted tokens per byte."""
        values = super().compute()
        bits = self.tokens_per_byte / math.log(2)
        ends = ("", "_low", "_high")
        return values | {f"bits_per_byte{end}": values[f"loss{end}"] * bits for end in ends}


PREFERENCE_METRICS = (
    "rewards_chosen",
    "rewards_rejected",
    "rewards_accuracy",
    "rewards_margin",
    "logps_chosen",
    "logps_rejected",
)
ACCURACY_INTERVAL = ("rewards_accuracy_low", "rewards_accuracy_high")
Z_95 = 1.96


class PreferenceMetrics(Metric):
    """Means over the pairs of a split, all ranks together, and their 95 % intervals.

    Sums are kept in float64 (float32 on devices without it), so that no batch size changes them.

    Args:
        names: What is measured of a pair beside its loss; ``rewards_accuracy`` among them.
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    num_pairs: Tensor

    def __init__(self, names: tuple[str, ...] = PREFERENCE_METRICS) -> None:
        super().__init__()
        self.names = names
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        zeros = torch.zeros(1 + len(names), dtype=wide)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("squares", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("num_pairs", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_B: Tensor, *measured: Tensor) -> None:
        """Add pairs: their losses, and what ``names`` names, one value each; all, or none where memory runs out."""
        values = torch.stack([loss_B, *measured]).to(self.sums.dtype)
        sums, squares = values.sum(1), values.square().sum(1)
        self.sums += sums
        self.squares += squares
        self.num_pairs += len(loss_B)

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` and ``names``, each with ``_low`` and ``_high``, of the accuracy by Wilson's interval."""
        names, mean, count = ("loss", *self.names), self.sums / self.num_pairs, self.num_pairs
        spread = (self.squares / count - mean**2).clamp(min=0)
        error = Z_95 * torch.sqrt(spread / (count - 1))
        means = dict(zip(names, mean, strict=True))
        lows = {f"{name}_low": value for name, value in zip(names, mean - error, strict=True)}
        highs = {f"{name}_high": value for name, value in zip(names, mean + error, strict=True)}
        interval = wilson_interval(means["rewards_accuracy"], count)
        return {**means, **lows, **highs, **dict(zip(ACCURACY_INTERVAL, interval, strict=True))}


def wilson_interval(share: Tensor, count: Tensor, z: float = Z_95) -> tuple[Tensor, Tensor]:
    """Return the 95 % interval of a share of ``count`` draws (Wilson, 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count)
    spread = spread * torch.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - spread).clamp(min=0), (middle + spread).clamp(
        max=1
    )  # rounding is all there is beyond
