"""F16: a loss spike is recorded with the rows behind it, and training goes on."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from harness import CommandLine

from fine_tune.callbacks.loss_spikes import spike_limit
from fine_tune.errors import UserError
from fine_tune.modules import SFT
from fine_tune.runs.run_folder import RunFolder


def test_a_spike_lies_eight_spreads_above_the_median() -> None:
    losses = [1.0, 2.0, 3.0] * 5 + [2.0]
    assert spike_limit(losses) == pytest.approx(2 + 8 * 1.4826 * 1)


def test_a_smooth_loss_needs_a_rise_of_a_fifth() -> None:
    assert spike_limit([2.0] * 16) == pytest.approx(2.4)
    assert spike_limit([2.0] * 15) is None


def spike_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """Make the loss of these steps three times what it is; returns a list that will hold their rows."""
    original = SFT.loss_sums
    seen: list[int] = []

    def spoiled(self: SFT, micro_batch: Any) -> tuple[torch.Tensor]:
        (loss,) = original(self, micro_batch)
        if self.trainer.global_step + 1 not in steps:
            return (loss,)
        seen.extend(micro_batch["row_ids"])
        return (loss * 3,)

    monkeypatch.setattr(SFT, "loss_sums", spoiled)
    return seen


def test_a_loss_spike_is_recorded_with_its_rows(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spike_at(monkeypatch, 20)
    more = ["--data.epochs", "5", "--model.optimizer.lr", "1e-5"]
    outcome = command_line("fit", *fit_args, *more)
    assert outcome.code == 0, outcome.err
    (event,) = outcome.run().read()["events"]
    assert event["step"] == 20
    assert sorted(event["row_ids"]) == sorted(seen)
    assert f"explain-step {outcome.run().path} 20" in outcome.out


def test_a_spike_on_a_full_disk_is_one_warning_and_training_goes_on(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spike_at(monkeypatch, 20, 21)
    original = RunFolder.update

    def full(self: RunFolder, changes: Mapping[str, Any]) -> None:
        if "events" in changes:
            raise UserError(f"{self.path / 'run.json'}: cannot be written: No space left on device")
        original(self, changes)

    monkeypatch.setattr(RunFolder, "update", full)
    more = ["--data.epochs", "5", "--model.optimizer.lr", "1e-5"]
    outcome = command_line("fit", *fit_args, *more)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("No space left on device; training goes on") == 1
    assert "of step 20, where" in outcome.out and "of step 21, where" in outcome.out
    assert outcome.run().read()["status"] == "finished"
