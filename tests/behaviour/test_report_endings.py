"""How a run and its tests ended, as its report and its last lines tell it."""

from pathlib import Path

from harness import CommandLine
from report_page import ReportPage

from fine_tune.report.write import write_report


def told(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.md").read_text("utf-8")


def test_early_stopping_is_named(command_line: CommandLine, fit_args: list[str]) -> None:
    flags = ["--early_stopping.patience", 1, "--early_stopping.min_delta", 100]
    outcome = command_line("fit", *fit_args, *flags, "--data.epochs", 4)
    assert outcome.code == 0, outcome.err
    step = outcome.run().read()["step"]
    assert step < 20
    assert "early stopping ended it: val/loss no longer improved" in outcome.out
    assert f"Early stopping ended the run at step {step} of 20." in told(outcome.run().path)
    whole = command_line("fit", *fit_args, "--name", "whole")
    assert "early stopping" not in whole.out
    assert "The run took all it was planned to: 10 of 10 steps." in told(whole.run("whole").path)


def test_a_test_that_was_broken_off_has_opened_its_split(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    fitted = command_line("fit", *fit_args)
    run = fitted.run()
    assert told(run.path).count("The test split was not opened.") == 2
    config = run.path / "config.yaml"
    stop = ["--trainer.callbacks+=signal_at.SignalAt", "--trainer.callbacks.name", "SIGINT"]
    stop += ["--trainer.callbacks.hook", "test_batch", "--trainer.callbacks.fn", "test"]
    stopped = command_line("test", "--config", config, "--ckpt_path", "best", *stop, root=False)
    assert stopped.code == 130
    assert "no result of this test was kept; its opening of the test split counts" in stopped.out
    page = told(run.path)
    assert "The test split was not opened." not in page
    assert page.count("no result of it was kept: each test was broken off. Openings by") == 2


def test_a_run_without_a_test_split_offers_no_test(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--data.split", "{train: 0.8, validation: 0.2}")
    assert outcome.code == 0, outcome.err
    assert "fine_tune test" not in outcome.out
    page = told(outcome.run().path)
    assert "fine_tune test" not in page and "The data has no test split." in page


def test_a_test_at_the_end_is_not_offered_again(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--test_at_end", "true")
    assert "next: python -m fine_tune chat" in outcome.out
    assert "fine_tune test" not in outcome.out


def test_speed_and_evaluations_are_those_of_the_time_that_is_known(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", 6, "--data.epochs", 4).run()
    (start,) = run.read()["starts"]
    assert (start["from_step"], start["to_step"]) == (0, 6) and start["seconds"] > 0
    killed = {"time": start["time"], "from_step": 0}  # as a kill leaves it
    run.update({"starts": [killed], "seconds": 0.0})
    longer = [
        "--config",
        run.path / "config.yaml",
        "--trainer.max_steps",
        10,
        "--ckpt_path",
        "last",
    ]
    outcome = command_line("fit", *longer, root=False)
    assert outcome.code == 0, outcome.err
    record = run.read()
    rate = record["num_tokens"]["train"] / record["steps_per_epoch"] * 4 / record["seconds"]
    assert f", {rate:,.0f} tokens/s" in outcome.out
    facts = ReportPage(write_report(run.path)).parts["cost"].facts
    assert "without a start that was killed: of 4 of the 10 steps" in facts["Time of training"]
    of_step = {row["step"]: row["perf/evaluation_seconds"] for row in outcome.metrics()}
    late = sum(float(of_step[step]) for step in ("10",) if of_step[step])
    assert facts["of it evaluations"].split()[0] == f"{late:.1f}" or late < 1


def test_a_broken_off_run_that_improves_is_told_to_be_resumed(tmp_path: Path) -> None:
    rows = [f"{step},{4 - step / 60}" for step in range(1, 201)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train/loss", *rows]))
    (tmp_path / "config.yaml").write_text("trainer: {log_every_n_steps: 1}")
    record = '{"status": "STATUS", "step": 200, "num_steps": 400}'
    (tmp_path / "run.json").write_text(record.replace("STATUS", "failed"))
    page = told(tmp_path)
    assert "when it was broken off: resume it." in page and "more epochs" not in page
    (tmp_path / "run.json").write_text(record.replace("STATUS", "finished"))
    assert "more epochs (--data.epochs) are likely to help" in told(tmp_path)


def test_the_command_that_reproduces_a_run_begins_where_its_settings_were_given(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", 1).run()
    config = run.path / "config.yaml"
    assert f"cd {Path.cwd()} && python -m fine_tune fit --config {config}" in told(run.path)
