"""Direct preference optimization and its relatives: one loss per pair, averaged over the pairs of the step.

Shape letters: B pairs, 2 answers (chosen, rejected).
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fine_tune import losses
from fine_tune.batches import PreferenceBatch, data_of
from fine_tune.errors import UserError
from fine_tune.modules.base import StepModule
from fine_tune.modules.cached_reference import CachedReference
from fine_tune.modules.evaluation import in_parts
from fine_tune.modules.metrics import ACCURACY_INTERVAL, PREFERENCE_METRICS, PreferenceMetrics
from fine_tune.modules.pair_logps import pair_logps
from fine_tune.modules.pairs import can_share, take_pairs
from fine_tune.modules.reference import LiveReference, Reference

Loss = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo"]
WITHOUT_REFERENCE = ("simpo", "orpo")


class DPO(StepModule):
    __doc__ = (
        (StepModule.__doc__ or "")
        .replace(
            "Base of all modules: builds the model, and takes one optimizer step per batch.",
            "Direct preference optimization of a causal language model, all weights or LoRA.",
        )
        .replace(
            "    Args:\n",
            """    Args:
        loss: sigmoid (DPO), ipo, hinge, robust, apo_zero, apo_down; simpo and orpo need no reference.
        beta: How strongly the policy is held to the reference; for simpo the scale, for orpo the weight of the odds.
        label_smoothing: Share of pairs taken to be labelled wrongly, for sigmoid (cDPO) and robust.
        simpo_margin: By how much the chosen answer shall win under simpo.
        sft_weight: Weight of the NLL per token of the chosen answer, added to the loss (RPO, arXiv 2404.19733).
        ld_alpha: Weight of what a longer answer has more than the shorter one (LD-DPO, arXiv 2409.06411); 1: all.
        reference: cached: the reference's log-probabilities are computed once, before the first step, and kept on disk
            for any other beta, seed or restart. live: at every step, by the same weights with the adapters off; where
            all weights are trained, by a copy of them.
        prefix_sharing: Compute the prompt once for both answers. None: where the model's attention allows it.
""",
        )
    )

    step_metrics = PREFERENCE_METRICS
    evaluation_metrics = ("loss", *PREFERENCE_METRICS, *ACCURACY_INTERVAL)

    def __init__(
        self,
        loss: Loss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        simpo_margin: float = 0.5,
        sft_weight: float = 0.0,
        ld_alpha: float = 1.0,
        reference: Literal["cached", "live"] = "cached",
        prefix_sharing: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        problems = _problems(loss, beta, label_smoothing, sft_weight, ld_alpha)
        if problems:
            raise UserError(*problems)
        self.loss, self.beta, self.ld_alpha = loss, beta, ld_alpha
        self.sft_weight, self.prefix_sharing = sft_weight, prefix_sharing
        smoothed: dict[str, Any] = {"beta": beta, "label_smoothing": label_smoothing}
        self.loss_function = {
            "sigmoid": partial(losses.sigmoid_loss, **smoothed),
            "robust": partial(losses.robust_loss, **smoothed),
            "hinge": partial(losses.hinge_loss, beta=beta),
            "ipo": partial(losses.ipo_loss, beta=beta),
            "apo_zero": partial(losses.apo_zero_loss, beta=beta),
            "apo_down": partial(losses.apo_down_loss, beta=beta),
            "simpo": partial(losses.simpo_loss, beta=beta, margin=simpo_margin),
            "orpo": partial(losses.orpo_loss, beta=beta),
        }[loss]
        self.metrics = PreferenceMetrics()
        self.shares_prefix = False
        self.reference_kind = reference
        self.reference: Reference | None = None

    def on_fit_start(self) -> None:
        self._prepare(["train", "validation"])

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._prepare(["validation"])

    def on_test_start(self) -> None:
        self._prepare(["test"])

    def loss_count(self, batch: PreferenceBatch) -> int:
        return len(batch["lengths"])

    def loss_sums(self, micro_batch: PreferenceBatch) -> tuple[Tensor, ...]:
        loss_B, metrics = self._losses(micro_batch)
        return loss_B.sum(), *(value_B.detach().float().sum() for value_B in metrics.values())

    def take_rows(self, batch: PreferenceBatch, rows: slice) -> PreferenceBatch:
        return take_pairs(batch, rows)

    def evaluate(self, micro_batch: PreferenceBatch) -> None:
        loss_B, metrics = self._losses(micro_batch)
        self.metrics.update(loss_B, *metrics.values())
        if self.compares_rows:
            self.row_losses.update(micro_batch["row_ids"], [1] * len(loss_B), loss_B)

    def loss_of_no_weight(self, micro_batch: PreferenceBatch) -> Tensor:
        logps_B2 = pair_logps(self.model, micro_batch, shared=self.shares_prefix).weighted(1.0)
        if isinstance(self.reference, LiveReference):
            self.reference.of(micro_batch, self.ld_alpha)
        return logps_B2.sum() * 0.0

    def log_odds(self, batch: PreferenceBatch) -> dict[int, float]:
        """Return how much likelier the model finds each pair's chosen answer than the rejected one, by row id.

        ``log p(chosen) - log p(rejected)``, without dropout.
        """
        assert self.model is not None
        found: dict[int, float] = {}

        def add(pairs: PreferenceBatch) -> None:
            logps_B2 = pair_logps(self.model, pairs, shared=self.shares_prefix).weighted(1.0)
            odds_B = logps_B2[:, 0] - logps_B2[:, 1]
            found.update(zip(pairs["row_ids"], odds_B.tolist(), strict=True))

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                in_parts(self, batch, add)
        finally:
            self.model.train(was_training)
        return found

    def _losses(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair, and what else is measured of it, in the order of ``PREFERENCE_METRICS``."""
        at_once = self.logit_chunks.at_once(self.model, sum(batch["num_supervised"]))
        policy = pair_logps(self.model, batch, shared=self.shares_prefix, at_once=at_once)
        logps_B2 = policy.weighted(self.ld_alpha)
        per_token_B2 = logps_B2 / policy.num_tokens_B2
        ratios_B2 = per_token_B2.float()
        if self.reference is not None:
            ratios_B2 = (logps_B2 - self.reference.of(batch, self.ld_alpha)).float()
        rewards_B2 = self.beta * ratios_B2
        if self.loss == "ipo":
            ratios_B2 = ratios_B2 / policy.num_tokens_B2
        loss_B = self.loss_function(*ratios_B2.unbind(1))
        if self.sft_weight:
            loss_B = loss_B - self.sft_weight * per_token_B2[:, 0].float()
        chosen_B, rejected_B = rewards_B2.detach().unbind(1)
        measured = (
            chosen_B,
            rejected_B,
            (chosen_B > rejected_B).float(),
            chosen_B - rejected_B,
            *logps_B2.detach().unbind(1),
        )
        return loss_B, dict(zip(PREFERENCE_METRICS, measured, strict=True))

    def _prepare(self, splits: list[str]) -> None:
        if self.prefix_sharing is None:
            self.shares_prefix = can_share(self.model, _logps)
        else:
            self.shares_prefix = self.prefix_sharing
        if self.loss in WITHOUT_REFERENCE:
            return
        if self.reference is None:
            folder = data_of(self.trainer).cache_dir
            live = self.reference_kind == "live"
            self.reference = LiveReference(self) if live else CachedReference(self, folder)
        with torch.no_grad():
            for split in splits:
                if split in self.plan.num_rows:
                    self.reference.prepare(split)


def _logps(model: Any, batch: PreferenceBatch, shared: bool) -> Tensor:
    return pair_logps(model, batch, shared=shared).weighted(1.0)


def _problems(
    loss: str, beta: float, label_smoothing: float, sft_weight: float, ld_alpha: float
) -> list[str]:
    problems = []
    if not 0 < beta < float("inf"):
        problems.append(f"model.beta: must be above 0 and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        problems.append(
            f"model.label_smoothing: lies from 0 up to, but not at, 0.5; got {label_smoothing}"
        )
    if label_smoothing and loss not in ("sigmoid", "robust"):
        problems.append(
            f"model.label_smoothing: has no effect on {loss}; sigmoid and robust use it"
        )
    if not 0 <= sft_weight < float("inf"):
        problems.append(f"model.sft_weight: must not be negative, got {sft_weight}")
    if not 0 <= ld_alpha <= 1:
        problems.append(f"model.ld_alpha: lies between 0 and 1, got {ld_alpha}")
    return problems
