"""What the report says of a run that was killed, by whoever it is written."""

import json
from typing import Any

import pytest
from harness import CommandLine
from report_page import ReportPage

from fine_tune.runs.run_lock import RunLock


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_killed_run_that_is_measured_is_still_killed(
    command_line: CommandLine, fit_args: list[str], verb: str
) -> None:
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 2)
    run = outcome.run()
    run.update({"status": "running"})  # as a kill leaves it; its lock ended with its process
    config = run.path / "config.yaml"
    args = ["--config", config, "--ckpt_path", "last", "--report", "en"]
    measured = command_line(verb, *args, root=False)
    assert measured.code == 0, measured.err
    assert ReportPage(run.path / "report.html").texts["p.badge bad"] == "killed"
    (listed,) = json.loads(command_line("runs", "--json", "--root", outcome.root).out)
    assert listed["status"] == "killed" and listed["resumable"]


def test_a_lock_that_cannot_be_given_back_costs_no_report(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = RunLock.release

    def fail(lock: Any) -> None:
        release(lock)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RunLock, "release", fail)
    with pytest.raises(OSError, match="Input/output error"):
        command_line("fit", *fit_args, "--trainer.max_steps", 1, "--report", "en")
    (file,) = command_line("--version").root.glob("lightning_logs/run/version_0/report.html")
    assert ReportPage(file).texts["p.badge good"] == "finished"
