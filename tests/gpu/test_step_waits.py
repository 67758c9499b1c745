"""On a real device: a training step makes the host wait once."""

import warnings
from typing import Any

import pytest
import torch
from harness import CommandLine
from lightning.pytorch import Callback, Trainer

pytestmark = pytest.mark.gpu


class Waits(Callback):
    """Let torch tell of each wait between the beginnings of two steps."""

    def __init__(self) -> None:
        self.per_step: list[list[str]] = []
        self._told: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._end()
        if 3 <= trainer.global_step < 8:
            self._catch = warnings.catch_warnings(record=True)
            self._told = self._catch.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._told is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._catch.__exit__(None, None, None)
            self.per_step.append(
                [str(w.message) for w in self._told if "synchroniz" in str(w.message)]
            )
            self._told = None


@pytest.mark.parametrize("budget", [10_000, 64])
def test_a_step_waits_once(
    command_line: CommandLine, fit_args: list[str], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    monkeypatch.setattr("fine_tune.folder_cli.TestOpenings", lambda: waits)  # idle while training
    outcome = command_line(
        *("fit", *fit_args, "--trainer.log_every_n_steps", 100, "--trainer.accelerator", "gpu"),
        *("--data.max_tokens_per_micro_batch", budget, "--trainer.precision", "bf16-mixed"),
    )
    assert outcome.code == 0, outcome.err
    assert [len(told) for told in waits.per_step] == [1] * 5, waits.per_step
