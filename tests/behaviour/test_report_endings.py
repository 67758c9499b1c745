"""How a run and its tests ended, as its report and its last lines tell it."""

import json
import shlex
from pathlib import Path

from harness import CommandLine, write_rows
from report_page import ReportPage

from fine_tune.report.write import write_report
from fine_tune.runs.listing import list_runs


def told(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.md").read_text("utf-8")


def test_early_stopping_is_named(command_line: CommandLine, fit_args: list[str]) -> None:
    flags = ["--early_stopping.patience", 1, "--early_stopping.min_delta", 100]
    outcome = command_line("fit", *fit_args, *flags, "--data.epochs", 4)
    assert outcome.code == 0, outcome.err
    step = outcome.run().read()["step"]
    assert step < 20
    assert "early stopping ended it: the metric it watches no longer improved" in outcome.out
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


def test_a_killed_start_is_not_timed_by_one_that_had_no_step_left(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", 8).run()
    first = {"from_step": 0, "to_step": 2, "seconds": 0.2}
    run.update({"status": "running", "seconds": 0.2, "starts": [first, {"from_step": 2}]})
    config = ["--config", run.path / "config.yaml", "--ckpt_path", "last"]
    outcome = command_line("fit", *config, root=False)
    assert outcome.code == 0 and run.read()["status"] == "finished"
    assert run.read()["starts"] == [first, {"from_step": 2}]


def test_a_run_tested_on_other_rows_is_still_tested_on_its_own(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", 1).run()
    rows = [{"question": f"Ibu kota ke-{i}?", "answer": "Jakarta"} for i in range(7)]
    paths = {"train": fit_args[fit_args.index("--data.path") + 1]}
    paths["test"] = str(write_rows(tmp_path / "other.jsonl", rows))
    config = ["--config", run.path / "config.yaml", "--ckpt_path"]
    other = command_line("test", *config, "best", "--data.path", json.dumps(paths), root=False)
    assert other.code == 0, other.err
    fitted = command_line("fit", *config, "last", "--test_at_end", "true", root=False)
    assert fitted.code == 0, fitted.err
    counts = [r["num_rows"] for r in run.read()["results"] if r["split"] == "test"]
    assert counts == [7, run.read()["num_rows"]["test"]]


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


def test_commands_begin_where_the_run_was_last_started_if_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("name: x")
    home = tmp_path / "my fit runs"
    home.mkdir()
    for last, told_there in ((home, True), (tmp_path / "gone", False), ("/" + "a" * 5000, False)):
        given = [
            {"directory": "/home/gone", "command": []},
            {"directory": str(last), "command": []},
        ]
        record = {"status": "finished", "last": "c", "num_rows": {"train": 9, "test": 1}}
        (tmp_path / "run.json").write_text(json.dumps({**record, "commands": given}))
        page, config = told(tmp_path), shlex.quote(str(tmp_path / "config.yaml"))
        there = f"cd {shlex.quote(str(home))} && " if told_there else ""
        for verb, more in (("fit", ""), ("test", " --ckpt_path best")):
            assert f"\n{there}python -m fine_tune {verb} --config {config}{more}\n" in page
        list_runs(tmp_path)  # whatever stands there


def test_the_command_that_reproduces_a_run_begins_where_its_settings_were_given(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", 1).run()
    config = run.path / "config.yaml"
    assert f"cd {Path.cwd()} && python -m fine_tune fit --config {config}" in told(run.path)
