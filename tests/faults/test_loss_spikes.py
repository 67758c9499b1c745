"""F16: a loss spike is recorded with the rows behind it, and training goes on."""

from typing import Any

import pytest
import torch
from harness import CommandLine

from fine_tune.callbacks.loss_spikes import spike_limit
from fine_tune.modules import SFT


def test_a_spike_lies_eight_spreads_above_the_median() -> None:
    losses = [1.0, 2.0, 3.0] * 5 + [2.0]
    assert spike_limit(losses) == pytest.approx(2 + 8 * 1.4826 * 1)


def test_a_smooth_loss_needs_a_rise_of_a_fifth() -> None:
    assert spike_limit([2.0] * 16) == pytest.approx(2.4)
    assert spike_limit([2.0] * 15) is None


def test_a_loss_spike_is_recorded_with_its_rows(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFT.loss_sums
    seen: list[int] = []

    def spoiled(self: SFT, micro_batch: Any) -> tuple[torch.Tensor]:
        (loss,) = original(self, micro_batch)
        if self.trainer.global_step + 1 != 20:
            return (loss,)
        seen.extend(micro_batch["row_ids"])
        return (loss * 3,)

    monkeypatch.setattr(SFT, "loss_sums", spoiled)
    more = ["--data.epochs", "5", "--model.optimizer.lr", "1e-5"]
    outcome = command_line("fit", *fit_args, *more)
    assert outcome.code == 0, outcome.err
    (event,) = outcome.run().read()["events"]
    assert event["step"] == 20
    assert sorted(event["row_ids"]) == sorted(seen)
    assert f"explain-step {outcome.run().path} 20" in outcome.out
