"""What the report says of settings that nobody gave."""

import json

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
