"""What the report says of settings: those nobody gave, and those that are shares."""

import json
from pathlib import Path

import pytest
from harness import CommandLine
from report_page import ReportPage

from fine_tune.report.write import write_report


def test_what_was_left_to_the_defaults_is_shown_as_it_was(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--model.lora.r", 4, "--trainer.max_steps", 2)
    assert outcome.code == 0, outcome.err
    run = outcome.run()
    last = run.checkpoint("last")
    assert last is not None
    adapter = json.loads((last / "adapter_config.json").read_text())
    facts = ReportPage(write_report(run.path)).parts["setup"].facts
    assert facts["LoRA targets"] == ", ".join(sorted(adapter["target_modules"]))
    assert {"q_proj", "v_proj"} <= set(adapter["target_modules"])
    assert (facts["LoRA r"], facts["LoRA alpha"]) == ("4", f"{adapter['lora_alpha']}")
    steps = run.read()["steps_per_epoch"]
    assert facts["Validation interval"] == f"every epoch ({steps} steps)"
    assert "validation" in run.read()["num_rows"]
    (last / "adapter_config.json").unlink()
    facts = ReportPage(write_report(run.path)).parts["setup"].facts
    assert facts["LoRA targets"] == "peft's default layers"


@pytest.mark.parametrize(
    ("interval", "per_epoch", "shown"),
    [
        (0.5, 98, "50 % of an epoch (49 steps)"),
        (0.001, 98, "0.1 % of an epoch (1 steps)"),
        (1.0, 98, "100 % of an epoch (98 steps)"),
        (0.5, None, "50 % of an epoch"),
        (1, 98, "every 1 steps"),
    ],
)
def test_a_share_between_validations_says_of_what_and_how_many_steps(
    tmp_path: Path, interval: float, per_epoch: int | None, shown: str
) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer: {{val_check_interval: {interval}}}")
    (tmp_path / "run.json").write_text(json.dumps({"steps_per_epoch": per_epoch}))
    facts = ReportPage(write_report(tmp_path)).parts["setup"].facts
    assert facts["Validation interval"] == shown


@pytest.mark.parametrize("dirty", [True, False])
def test_code_that_was_not_committed_is_told(tmp_path: Path, dirty: bool) -> None:
    environment = {"git_commit": "abc123", **({"git_dirty": True} if dirty else {})}
    (tmp_path / "run.json").write_text(json.dumps({"environment": environment}))
    shown = ReportPage(write_report(tmp_path)).parts["setup"].facts["Git commit"]
    assert shown == ("abc123, with changes that were not committed" if dirty else "abc123")
