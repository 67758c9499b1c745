"""A reward model: one number per answer, learned from pairs by the Bradley-Terry model.

Shape letters: B pairs, D model, N positions, 2 answers (chosen, rejected).
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fine_tune.batches import DataPlan, PredictBatch, PreferenceBatch, on_device
from fine_tune.errors import UserError
from fine_tune.losses import bradley_terry_loss
from fine_tune.models import Head
from fine_tune.modules.base import StepModule
from fine_tune.modules.metrics import ACCURACY_INTERVAL, PREFERENCE_METRICS, PreferenceMetrics
from fine_tune.modules.pairs import can_share, pair_inputs, take_pairs
from fine_tune.modules.prediction import score_answers

REWARD_METRICS = PREFERENCE_METRICS[:4]


class Reward(StepModule):
    __doc__ = (
        (StepModule.__doc__ or "")
        .replace(
            "Base of all modules: builds the model, and takes one optimizer step per batch.",
            "A reward model with a scalar head on the last token of an answer, all weights or LoRA; the head is always "
            "trained.",
        )
        .replace(
            "    Args:\n",
            """    Args:
        center_rewards: Weight of the squared sum of both rewards, which keeps them near 0 (0.01 in arXiv 2312.09244).
        prefix_sharing: Compute the prompt once for both answers. None: where the model's attention allows it.
""",
        )
    )

    head: Head = "score"
    step_metrics = REWARD_METRICS
    evaluation_metrics = ("loss", *REWARD_METRICS, *ACCURACY_INTERVAL)

    def __init__(
        self, center_rewards: float = 0.0, prefix_sharing: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= center_rewards < float("inf"):
            raise UserError(f"model.center_rewards: must not be negative, got {center_rewards}")
        self.center_rewards, self.prefix_sharing = center_rewards, prefix_sharing
        self.shares_prefix = False
        self.metrics = PreferenceMetrics(REWARD_METRICS)

    def on_fit_start(self) -> None:
        self._decide_sharing()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._decide_sharing()

    def on_test_start(self) -> None:
        self._decide_sharing()

    def loss_count(self, batch: PreferenceBatch) -> int:
        return len(batch["lengths"])

    def loss_sums(self, micro_batch: PreferenceBatch) -> tuple[Tensor, ...]:
        loss_B, measured = self._losses(micro_batch)
        return loss_B.sum(), *(value_B.sum() for value_B in measured)

    def take_rows(self, batch: PreferenceBatch, rows: slice) -> PreferenceBatch:
        return take_pairs(batch, rows)

    def evaluate(self, micro_batch: PreferenceBatch) -> None:
        loss_B, measured = self._losses(micro_batch)
        self.metrics.update(loss_B, *measured)
        if self.compares_rows:
            self.row_losses.update(micro_batch["row_ids"], [1] * len(loss_B), loss_B)

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> None:
        score_answers(self, batch, self._rewards)

    def check(self, plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> None:
        """As for any module; and refuse margins that are no numbers."""
        if plan.unread_margins:
            raise UserError(
                f"data.path: the field 'margin' of {plan.unread_margins:,} pairs is no number; give numbers, or "
                "leave the field out"
            )
        super().check(plan, tokenizer)

    def _rewards(self, input_ids_BT: Tensor, lasts_B: Tensor) -> Tensor:
        whole = _whole(self.model)
        hidden_BTD = whole.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        rows_B = torch.arange(len(lasts_B), device=lasts_B.device)
        rewards_B: Tensor = whole.score(hidden_BTD[rows_B, lasts_B]).squeeze(-1).float()
        return rewards_B

    def _losses(self, batch: PreferenceBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss of each pair, and what ``REWARD_METRICS`` names of it."""
        rewards_B2 = pair_rewards(self.model, batch, self.shares_prefix)
        chosen_B, rejected_B = rewards_B2.unbind(1)
        margins_B = on_device(batch["margins"], rewards_B2.device)
        loss_B = bradley_terry_loss(
            chosen_B, rejected_B, margins_B=margins_B, center=self.center_rewards
        )
        chosen_B, rejected_B = rewards_B2.detach().unbind(1)
        return loss_B, (
            chosen_B,
            rejected_B,
            (chosen_B > rejected_B).float(),
            chosen_B - rejected_B,
        )

    def _decide_sharing(self) -> None:
        if self.prefix_sharing is None:
            self.shares_prefix = can_share(self.model, _last_hidden)
        else:
            self.shares_prefix = self.prefix_sharing


def pair_rewards(model: Any, batch: PreferenceBatch, shared: bool) -> Tensor:
    """Compute the reward of both answers of each pair, at their last tokens.

    The position is known, never found by a pad id, which may be that of the stop token.

    Args:
        model: A model with a scalar head, ``score``, or a peft model around one.
        batch: Pairs; see ``PreferenceBatch``.
        shared: See ``pair_inputs``.

    Returns:
        ``[B, 2]``, in float32 or wider.
    """
    whole: Any = _whole(model)
    rewards_N1 = whole.score(_last_hidden(model, batch, shared))
    rewards_B2 = rewards_N1.view(len(batch["lengths"]), 2)
    return rewards_B2.float() if rewards_B2.element_size() < 4 else rewards_B2


def _whole(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _last_hidden(model: Any, batch: PreferenceBatch, shared: bool) -> Tensor:
    """Return the hidden state of both answers' last tokens, ``[2B, D]``, chosen and rejected by turns."""
    whole = _whole(model)
    inputs, place = pair_inputs(whole, batch, shared=shared)
    device, num_pairs = inputs["input_ids"].device, len(batch["lengths"])
    lasts = [
        (prompt + chosen - 1, length - 1)
        for prompt, chosen, length in zip(
            batch["num_prompt"], batch["num_chosen"], batch["lengths"], strict=True
        )
    ]
    positions_N = on_device(lasts, device).flatten()
    rows_N = torch.arange(num_pairs, device=device).repeat_interleave(2)
    sides_N = torch.arange(2, device=device).repeat(num_pairs)
    hidden_BTD = whole.base_model(**inputs, use_cache=False).last_hidden_state
    last_ND: Tensor = hidden_BTD.flatten(0, 1)[place(rows_N, positions_N, sides_N)]
    return last_ND
