"""What made a run can be found in its folder: the rows behind every step, its data, its parents, its commands."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine, Outcome, write_rows
from test_resume import stop_at

from fine_tune.callbacks.run_record import environment as environment_of_run
from fine_tune.callbacks.step_rows import (
    StepRows,
    keep_until,
    record,
    recorded_steps,
    rows_of_step,
)
from fine_tune.provenance import without_secrets


def steps_of(outcome: Outcome, name: str = "run", version: int = 0) -> list[list[int]]:
    folder = outcome.run(name, version).path / "rows"
    first, last = recorded_steps(folder) or (1, 0)
    return [rows_of_step(folder, step).get(0, []) for step in range(first, last + 1)]


def test_every_step_leaves_the_ids_of_its_rows(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args)
    steps, record = steps_of(outcome), outcome.run().read()
    assert len(steps) == record["num_steps"]
    for epoch in (0, 1):
        of_epoch = steps[epoch * 5 : epoch * 5 + 5]
        assert len({row for step in of_epoch for row in step}) == record["num_rows"]["train"]
        assert sum(map(len, of_epoch)) == record["num_rows"]["train"]


def test_after_a_resume_no_step_is_missing_or_there_twice(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    straight = command_line("fit", *fit_args, "--name", "straight")
    every = ["--checkpoint.every", "2"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *fit_args, *every, *stop_at(4))
    rows = straight.run("run").path / "rows" / "rank_0.bin"
    rows.write_bytes(rows.read_bytes() + b"\1\0")  # a record that a power cut left unfinished
    resumed = command_line("fit", *fit_args, *every, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert rows.read_bytes() == (straight.run("straight").path / "rows/rank_0.bin").read_bytes()


def test_a_record_holds_ids_of_any_size(tmp_path: Path) -> None:
    for step, ids in enumerate([[0], [255, 3], [256], [70_000, 1], [2**40, 5], []], start=1):
        file = tmp_path / f"rank_{step}.bin"
        file.write_bytes(record(7, ids))
        assert rows_of_step(tmp_path, 7)[step] == ids
    assert len(record(1, [999_999] * 8)) == 33  # ten epochs of a million rows by eight: 41 MB
    keep_until(tmp_path / "rank_1.bin", 6)
    assert (tmp_path / "rank_1.bin").read_bytes() == b""


def test_recording_a_step_takes_microseconds(tmp_path: Path) -> None:
    callback, ids = StepRows(), list(range(900_000, 900_064))

    class Trainer:
        global_step = 1

    with open(tmp_path / "rank_0.bin", "ab", buffering=0) as callback._file:
        start = time.perf_counter()
        for _ in range(1000):
            callback.on_train_batch_start(Trainer(), None, {"row_ids": ids}, 0)  # type: ignore[arg-type]
        assert time.perf_counter() - start < 0.5  # 0.5 ms a step on a busy machine; measured 0.02


def test_more_steps_than_memory_holds_leave_a_gap_that_is_told(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fine_tune.callbacks.step_rows.MOST_WAITING", 3)
    original = StepRows._write

    def full(self: StepRows, trainer: Any) -> None:
        if 1 <= trainer.global_step < 7:
            return self._tell(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return original(self, trainer)

    monkeypatch.setattr(StepRows, "_write", full)
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 0, outcome.err
    assert "those of the last 3 steps wait in memory" in outcome.out
    told = command_line("explain-step", outcome.run().path, 4)
    assert told.code == 2
    assert "has no record of the rows of steps 2 to 5" in told.err


def test_explain_step_shows_the_rows_and_where_they_come_from(
    command_line: CommandLine, fit_args: list[str], rows_file: Path
) -> None:
    trained = command_line("fit", *fit_args)
    ids = steps_of(trained)[2]
    loss = trained.metrics()[2]["train/loss"]
    told = command_line("explain-step", trained.run().path, 3)
    assert told.code == 0, told.err
    assert f"train/loss {loss}" in told.out
    assert f"rank 0: {', '.join(map(str, ids))}" in told.out
    assert "the same rows follow from data.seed" in told.out
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for row_id in ids:
        assert f"row id {row_id}, {rows_file}:{row_id + 1}: " in told.out
        assert f"{rows[row_id]['question']}\u00ab {rows[row_id]['answer']}\u00bb" in told.out
    by_name = command_line("explain-step", "run/version_0", 3, "--root", trained.root)
    assert by_name.out == told.out


def test_a_mistake_in_explain_step_is_one_line(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    root = command_line("fit", *fit_args, "--trainer.max_steps", "3").root
    for args, message in {
        ("rum", "1"): "run: no run 'rum'; there are run",
        ("run/version_7", "1"): "run: 'run' has version_0, not version_7",
        ("run", "99"): "has rows of steps 1 to 3, asked for 99",
    }.items():
        told = command_line("explain-step", *args, "--root", root)
        assert told.code == 2
        assert told.err.count("\n") == 1
        assert message in told.err


def test_explain_step_shows_the_rows_of_a_run_whose_metrics_are_damaged_or_gone(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "2").run()
    metrics = run.path / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes().splitlines()[0] + b"\n\0\0\n")
    damaged = command_line("explain-step", run.path, 1)
    assert damaged.code == 0 and "its loss was not logged" in damaged.out
    metrics.unlink()
    gone = command_line("explain-step", run.path, 1)
    assert gone.code == 0 and f"its loss is not known: {metrics} is missing" in gone.out
    assert "rank 0: " in gone.out


def test_explain_step_stops_where_the_data_has_changed(
    command_line: CommandLine, fit_args: list[str], rows_file: Path
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "2").run()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    write_rows(rows_file, [{**row, "answer": "0"} for row in rows])
    told = command_line("explain-step", run.path, 1)
    assert told.code == 2
    assert f"data: {rows_file}: is not what the run was trained on any more" in told.err


@pytest.mark.parametrize("given", ["checkpoint", "run folder"])
def test_a_run_knows_its_parents(
    command_line: CommandLine, fit_args: list[str], given: str
) -> None:
    parent = command_line("fit", *fit_args, "--name", "parent").run("parent")
    last = parent.checkpoint("best")
    model = last if given == "checkpoint" else parent.path
    child = command_line("fit", *fit_args, "--model.model_name_or_path", model, "--name", "child")
    assert child.code == 0, child.err
    record = child.run("child").read()
    (known,) = record["parents"]
    origin = known.pop("origin")
    assert known == {
        "gave": "weights",
        "run": str(parent.path.resolve()),
        "checkpoint": last.name,  # type: ignore[union-attr]
        "identity_hash": parent.read()["identity_hash"],
    }
    assert origin["files"] == parent.read()["identity"]["data.files"]
    assert parent.read()["parents"] == []


def test_a_run_knows_its_commands_data_and_seeds(
    command_line: CommandLine, fit_args: list[str], rows_file: Path
) -> None:
    record = command_line("fit", *fit_args, "--trainer.max_steps", "2").run().read()
    (launch,) = record["commands"]
    assert launch["command"][:3] == ["fit", "--model", "fine_tune.modules.SFT"]
    identity = record["identity"]
    assert identity["seed_everything"] == identity["data.seed"] == 42
    (file,) = identity["data.files"]
    assert file["file"] == str(rows_file)
    assert len(file["content"]) == len(identity["data.training_rows"]) == 64
    assert {"python", "packages", "git_commit"} <= set(record["environment"])


def test_changes_that_are_not_committed_are_recorded_beside_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        return subprocess.check_output(["git", *names, *args], cwd=tmp_path, text=True).strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment_of_run()["git_commit"] is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "one")
    (tmp_path / "lightning_logs").mkdir()
    (tmp_path / "lightning_logs" / "log").write_text("not git's")
    assert environment_of_run()["git_commit"] == git("rev-parse", "HEAD")
    assert "git_dirty" not in environment_of_run()
    (tmp_path / "code.py").write_text("2")
    assert environment_of_run()["git_commit"] == git("rev-parse", "HEAD")
    assert environment_of_run()["git_dirty"] is True


def test_values_of_secret_variables_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-4711-canary")
    monkeypatch.setenv("HOME_TOKEN", "short")
    args = ["fit", "--name=canary-4711-canary", "--data.path", "/short/x"]
    assert without_secrets(args) == ["fit", "--name=***", "--data.path", "/short/x"]


@pytest.mark.slow
def test_two_processes_record_their_own_rows_and_one_goes_on_alone(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    straight = command_line("fit", *fit_args, "--name", "straight")
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    stopped = subprocess.run(
        [sys.executable, "-m", "fine_tune", "fit", *fit_args, *two, *stop_at(5)]
        + ["--checkpoint.every", "3", "--trainer.default_root_dir", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "a defect" in stopped.stderr
    rows = straight.run("run").path / "rows"
    assert sorted(rows_of_step(rows, 5)) == [0, 1]
    resumed = command_line("fit", *fit_args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    theirs = steps_of(straight, "straight")
    for step in range(1, 11):
        by_rank = rows_of_step(rows, step)
        assert sorted(by_rank) == ([0, 1] if step <= 3 else [0])
        assert sorted(i for ids in by_rank.values() for i in ids) == sorted(theirs[step - 1])
    losses = [
        [float(row["train/loss"]) for row in straight.metrics(name)] for name in ("straight", "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
