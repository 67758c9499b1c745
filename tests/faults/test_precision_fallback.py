"""Losses and gradients that are no numbers: the weights stay good, the rows are taken again, or named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine, Outcome
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import assert_same_run
from safetensors.torch import load_file

from fine_tune.callbacks.precision_fallback import PrecisionFallback
from fine_tune.modules import SFT

NO_REHEARSAL = ["--vram_guard.rehearse", "false"]
LORA = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj", "v_proj"]']


class HalfOnCpu(MixedPrecision):
    """16-mixed with a real gradient scaler, on a CPU."""

    def __init__(self, scale: float = 2.0**16) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        super().__init__("16-mixed", "cpu", scaler=scaler)


PLUGIN = [
    *("--trainer.plugins", "lightning.pytorch.plugins.MixedPrecision"),
    *("--trainer.plugins.precision", "bf16-mixed", "--trainer.plugins.device", "cpu"),
]
HALF = ["--trainer.plugins+=test_precision_fallback.HalfOnCpu", "--trainer.plugins.scale"]


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, only: Any = lambda: True) -> None:
    """Make the loss of a step no number, while ``only`` holds."""
    original = SFT.loss_sums

    def spoiled(self: SFT, micro_batch: Any) -> tuple[torch.Tensor]:
        (loss,) = original(self, micro_batch)
        spoils = self.trainer.global_step + 1 == step and only()
        return (loss * float("nan") if spoils else loss,)

    monkeypatch.setattr(SFT, "loss_sums", spoiled)


def in_autocast(dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


def steps(outcome: Outcome, name: str = "run") -> list[str]:
    return [row["step"] for row in outcome.metrics(name) if row["train/loss"]]


def assert_finite(outcome: Outcome) -> None:
    last = outcome.run().checkpoint("last")
    assert last is not None
    saved = load_file(next(last.glob("*.safetensors")))
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    assert all(float(row["train/loss"]) < 100 for row in outcome.metrics() if row["train/loss"])


@pytest.mark.parametrize(
    "settings", [[], LORA, ["--model.quantization", "nf4", "--model.lora", "auto"]]
)
def test_bf16_falls_back_to_32_bit_on_the_same_rows(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
) -> None:
    spoil(monkeypatch, 3, lambda: in_autocast(torch.bfloat16))
    args = [*fit_args, *settings, *NO_REHEARSAL, "--trainer.precision", "bf16-mixed"]
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    assert "the loss (nan) of step 3 is not finite in bf16-mixed (rows " in outcome.out
    assert "the same rows are taken again in 32-true" in outcome.out
    assert steps(outcome) == [str(step) for step in range(1, len(steps(outcome)) + 1)]
    assert_finite(outcome)
    (event,) = outcome.run().read()["events"]
    assert event["step"] == 3 and len(event["row_ids"]) == 8


def test_a_lowered_precision_stays_when_the_run_goes_on(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, lambda: in_autocast(torch.bfloat16))
    args = [
        *fit_args,
        *NO_REHEARSAL,
        "--trainer.precision",
        "bf16-mixed",
        "--checkpoint.every",
        "4",
    ]
    command_line("fit", *args, "--name", "straight")
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "6"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert "precision: 32-true, lowered earlier in this run" in resumed.out
    ours, theirs = ([r["train/loss"] for r in resumed.metrics(n)] for n in ("run", "straight"))
    assert ours == theirs


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_what_was_trained_in_a_lowered_precision_is_measured_in_it(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    spoil(monkeypatch, 3, lambda: in_autocast(torch.bfloat16))
    args = [*fit_args, *NO_REHEARSAL, "--trainer.precision", "bf16-mixed"]
    run = command_line("fit", *args).run()
    original, seen = SFT.evaluate, []

    def watched(self: SFT, micro_batch: Any) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        original(self, micro_batch)

    monkeypatch.setattr(SFT, "evaluate", watched)
    config = run.path / "config.yaml"
    outcome = command_line(verb, "--config", config, "--ckpt_path", "best", root=False)
    assert outcome.code == 0, outcome.err
    assert "precision: 32-true, lowered earlier in this run" in outcome.out
    assert seen and not any(seen)


@pytest.mark.parametrize(
    "precision",
    [["--trainer.precision", "bf16-mixed"], ["--trainer.precision", "bf16"], PLUGIN],
)
def test_answers_of_a_run_that_was_lowered_are_written_in_its_precision(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    precision: list[str],
) -> None:
    spoil(monkeypatch, 3, lambda: in_autocast(torch.bfloat16))
    run = command_line("fit", *fit_args, *NO_REHEARSAL, *precision).run()
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "What is 1 plus 1?"}\n')
    outcome = command_line(
        *("predict", "--config", run.path / "config.yaml", "--ckpt_path", "best"),
        *("--data.predict_path", asked, "--output", tmp_path / "out.jsonl"),
        root=False,
    )
    assert outcome.code == 0, outcome.err
    assert "precision: 32-true, lowered while the run was trained" in outcome.out
    assert "32-true on cpu" in outcome.out


def test_16_bit_lowers_its_scale_and_skips_no_step(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    fine = command_line("fit", *fit_args, *NO_REHEARSAL, *HALF, "1024", "--name", "fine")
    assert fine.code == 0, fine.err
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, *HALF, str(2.0**28))
    assert outcome.code == 0, outcome.err
    assert "events" not in outcome.run().read()
    ours, theirs = outcome.metrics(), outcome.metrics("fine")
    assert [row["lr"] for row in ours] == [row["lr"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        if row["train/loss"]:
            assert float(row["train/loss"]) == pytest.approx(
                float(expected["train/loss"]), rel=1e-2
            )
            assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=5e-2)


def test_16_bit_goes_down_the_ladder(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, lambda: torch.is_autocast_enabled("cpu"))
    skips = ["--precision_fallback.max_skips", "2"]
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, *skips, *HALF, "1024")
    assert outcome.code == 0, outcome.err
    first, second = outcome.run().read()["events"]
    assert "not finite in 16-mixed" in first["event"]
    assert "not finite in bf16-mixed" in second["event"]
    assert steps(outcome) == [str(step) for step in range(1, len(steps(outcome)) + 1)]
    assert_finite(outcome)


def test_32_bit_stops_with_the_rows_named_and_goes_on_once_they_are_mended(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*fit_args, *NO_REHEARSAL]
    straight = command_line("fit", *args, "--name", "straight")
    spoil(monkeypatch, 4)
    outcome = command_line("fit", *args)
    assert outcome.code == 2
    assert "the loss (nan) of step 4 is not finite in 32-true (rows " in outcome.err
    assert "weights and optimizer are still those of step 3" in outcome.err
    record = outcome.run().read()
    assert record["status"] == "failed"
    assert len(record["events"][0]["row_ids"]) == 8
    assert_finite(outcome)
    assert record["last"] == "epoch=0.60-step=3"  # saved at the stop, though no save was due
    monkeypatch.undo()
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("interval", [2, 3])
def test_what_follows_a_stop_is_validated_and_logged_at_the_steps_it_would_have_been(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--trainer.val_check_interval", str(interval)]
    args += ["--trainer.log_every_n_steps", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    spoil(monkeypatch, 5)
    assert command_line("fit", *args).code == 2
    monkeypatch.undo()
    assert_same_run(straight, command_line("fit", *args, "--ckpt_path", "last"))


def test_a_gradient_that_is_no_number_is_caught_before_the_update(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFT.backward

    def spoiled(self: SFT, loss: torch.Tensor, *args: Any) -> None:
        original(self, loss, *args)
        if self.trainer.global_step == 3 and in_autocast(torch.bfloat16) is False:
            next(p for p in self.parameters() if p.grad is not None).grad[0] = float("inf")  # type: ignore[index]

    monkeypatch.setattr(SFT, "backward", spoiled)
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--checkpoint.every", "1")
    assert outcome.code == 2
    assert "a gradient of step 4 is not finite in 32-true" in outcome.err
    assert_finite(outcome)


def test_an_update_that_ruins_the_weights_is_told(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--model.optimizer.lr", "1e30", "--checkpoint.every", "1"]
    outcome = command_line("fit", *args)
    assert outcome.code == 2
    assert "not finite" in outcome.err
    assert "There is no checkpoint from before" in outcome.err
    assert not outcome.run().has_checkpoint()


def ruin_weights(monkeypatch: pytest.MonkeyPatch, step: int, only: Any = lambda _: True) -> None:
    """Make a weight infinite in the update of a step, while ``only`` holds for the module."""
    original = SFT.optimizer_step

    def ruinous(self: SFT, *args: Any, **kwargs: Any) -> None:
        now = self.trainer.global_step + 1
        original(self, *args, **kwargs)
        if now == step and only(self):
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad).view(-1)[0] = float("inf")

    monkeypatch.setattr(SFT, "optimizer_step", ruinous)


def test_ruined_weights_are_not_saved_over_good_ones(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin_weights(monkeypatch, 4)
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--checkpoint.every", "2")
    assert outcome.code == 2
    assert "the weights after step 4 are not finite in 32-true" in outcome.err
    assert "The last checkpoint, epoch=0.40-step=2, is from before" in outcome.err
    assert outcome.run().read()["last"] == "epoch=0.40-step=2"
    assert_finite(outcome)
    monkeypatch.undo()
    resumed = command_line("fit", *fit_args, *NO_REHEARSAL, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_finite(resumed)


def test_a_precision_that_the_run_went_back_for_stays_when_it_goes_on(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin_weights(monkeypatch, 4, lambda module: module.trainer.precision == "bf16-mixed")
    args = [*fit_args, *NO_REHEARSAL, "--trainer.precision", "bf16-mixed"]
    args += ["--checkpoint.every", "2"]
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "7"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert "precision: 32-true, lowered earlier in this run" in resumed.out
    log = (resumed.run().path / "train.log").read_text()
    assert "going back to epoch=0.40-step=2: 2 steps are redone" in log
    assert_finite(resumed)


def test_going_back_keeps_the_config_from_before_a_change(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--checkpoint.every", "2"]
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "3"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    ruin_weights(monkeypatch, 4, lambda module: module.trainer.precision == "bf16-mixed")
    changed = ["--trainer.precision", "bf16-mixed", "--ckpt_path", "last"]
    resumed = command_line("fit", *args, *changed)
    assert resumed.code == 0, resumed.err
    assert "going back to epoch=0.40-step=2" in resumed.out
    earlier = (resumed.run().path / "config_until_step_2.yaml").read_text()
    assert "precision: 32-true" in earlier


def test_a_lowered_precision_is_never_raised_again(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, lambda: in_autocast(torch.float16))
    args = [*fit_args, *NO_REHEARSAL, "--checkpoint.every", "2"]
    skips = ["--precision_fallback.max_skips", "0"]
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "5"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *skips, *stop, *HALF, "1024")
    monkeypatch.undo()
    seen = []
    spoil(monkeypatch, 6, lambda: seen.append(torch.is_autocast_enabled("cpu")))
    resumed = command_line("fit", *args, "--ckpt_path", "last", "--trainer.precision", "32-true")
    assert resumed.code == 0, resumed.err
    assert resumed.run().read()["events"][0]["to"] == "bf16-mixed"
    assert seen and not any(seen)  # 32-true is safer than what it was lowered to


@pytest.mark.parametrize("first", ["bf16-mixed", "32-true"])
def test_of_two_lowered_precisions_the_safer_one_stays(first: str) -> None:
    guard = PrecisionFallback()
    guard.go_on_in(first)
    guard.load_state_dict({"lowered_to": "32-true" if first == "bf16-mixed" else "bf16-mixed"})
    guard.load_state_dict({"lowered_to": None})
    assert guard.state_dict() == {"lowered_to": "32-true"}


def test_validation_that_is_no_number_is_reported(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fine_tune.modules import token_rows

    original = token_rows.nll_per_token

    def spoiled(*args: Any) -> torch.Tensor:
        losses = original(*args)
        losses[0] = float("nan")
        return losses

    monkeypatch.setattr(token_rows, "nll_per_token", spoiled)
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--trainer.max_steps", "2")
    assert outcome.code == 0, outcome.err
    assert "WARNING: val/loss is nan" in outcome.out


def test_an_update_that_16_bit_weights_do_not_survive_is_told_before_the_first_step(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    plain = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "1e-3"]
    plain += ["--model.optimizer.foreach", "false"]
    refused = command_line("fit", *fit_args, *plain, "--trainer.precision", "16-true")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "trainer.precision: under 16-true AdamW makes weights of 16 bit infinite" in refused.err


def test_the_default_update_survives_16_bit_weights(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--trainer.precision", "16-true")
    assert outcome.code == 0, outcome.err
    losses = [float(row["train/loss"]) for row in outcome.metrics() if row["train/loss"]]
    assert losses[-1] < losses[0]
