"""A run that is asked to stop saves at its next step boundary, says so by its exit code, and resumes bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine
from processes import SLOW, TWO, assert_same_run, rank_pid, resume, start, wait_for_step

from fine_tune.runs.run_folder import RunFolder

MAX_STEPS = ["--trainer.max_steps", "10"]
CODES = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130}


def signal_at(name: str, **settings: Any) -> list[str]:
    flags = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    return ["--trainer.callbacks+=signal_at.SignalAt", f"--trainer.callbacks.name={name}", *flags]


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGUSR1", pytest.param("SIGINT", marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_the_next_step_boundary_and_the_run_resumes_bit_for_bit(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, name: str
) -> None:
    """Sent to every process of the run, its data workers too, as a terminal and a cluster do."""
    args = [*fit_args, "--data.num_workers", "1"]
    straight = command_line("fit", *args, "--name", "straight")
    process = start([*args, *SLOW], tmp_path)
    run = straight.run("run")
    wait_for_step(run, 2)
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[name], err
    record = run.read()
    assert record["status"] == "stopped"
    assert 2 < record["step"] < 6
    assert record["last"].endswith(f"step={record['step']}")
    assert f"stopped by {name} at step {record['step']} of 10" in out
    assert f"fit --config {run.path / 'config.yaml'} --ckpt_path last" in out
    assert "Traceback" not in err
    assert_same_run(straight, resume(command_line, run))


@pytest.mark.parametrize(
    ("hook", "step", "more"),  # validation is due after 5 and after 10
    [
        ("step", 5, []),
        ("step", 10, []),
        ("step", 10, MAX_STEPS),
        ("validation_batch", 5, MAX_STEPS),
        ("validation_batch", 10, []),
        pytest.param("step", 3, MAX_STEPS, marks=pytest.mark.slow),
        pytest.param("step", 5, MAX_STEPS, marks=pytest.mark.slow),
        pytest.param("validation_batch", 5, [], marks=pytest.mark.slow),
        pytest.param("validation_batch", 10, MAX_STEPS, marks=pytest.mark.slow),
    ],
)
def test_a_validation_that_was_left_out_is_run_on_resuming(
    command_line: CommandLine, fit_args: list[str], hook: str, step: int, more: list[str]
) -> None:
    args = [*fit_args, *more, "--data.eval_batch_size", "1", "--trainer.log_every_n_steps", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    more_than_one = signal_at("SIGTERM", step=step, hook=hook, times=2)
    stopped = command_line("fit", *args, *more_than_one)
    assert stopped.code == 143, stopped.err
    run = stopped.run()
    assert run.read()["status"] == "stopped"
    assert run.read()["last"].endswith(f"step={step}")
    assert run.read().get("results") is None  # neither the closing validation nor the test
    assert_same_run(straight, resume(command_line, run))


def test_a_signal_while_catching_up_on_a_validation_stops_again_without_a_loss(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, "--data.eval_batch_size", "1"]
    straight = command_line("fit", *args, "--name", "straight")
    first = command_line("fit", *args, *signal_at("SIGTERM", step=5))
    last = first.run().checkpoint("last")
    again = signal_at("SIGINT", step=5, hook="validation_batch")
    config = first.run().path / "config.yaml"
    second = command_line("fit", "--config", config, *again, "--ckpt_path", "last", root=False)
    assert second.code == 130, second.err
    assert second.run().checkpoint("last") == last
    assert_same_run(straight, resume(command_line, first.run()))


def test_early_stopping_counts_a_validation_that_was_left_out(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    patience = ["--early_stopping.patience", "1", "--early_stopping.min_delta", "100"]
    args = [*fit_args, *patience, "--data.epochs", "9"]
    straight = command_line("fit", *args, "--name", "straight")
    step = straight.run("straight").read()["step"]
    stopped = command_line("fit", *args, *signal_at("SIGTERM", step=step))
    assert stopped.run().read()["status"] == "stopped"
    assert_same_run(straight, resume(command_line, stopped.run()))


def test_a_second_ctrl_c_stops_now_and_the_last_whole_checkpoint_resumes(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    process = start([*args, *signal_at("SIGINT", step=5, times=2)], tmp_path)
    out, err = process.communicate(timeout=100)
    run = straight.run("run")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert run.read()["status"] == "stopped"
    assert run.read()["last"].endswith("step=4")
    assert "resume: python -m fine_tune fit" in out
    assert_same_run(straight, resume(command_line, run))


@pytest.mark.parametrize("hook", ["setup", "train_start"])
def test_a_signal_before_the_first_step_stops_at_once(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, hook: str
) -> None:
    assert command_line("merge", tmp_path).code == 2  # left the handler of its own behind once
    stopped = command_line("fit", *fit_args, *signal_at("SIGTERM", hook=hook))
    assert stopped.code == 143
    assert "before anything was saved" in stopped.out
    assert not list(stopped.run().path.glob("**/*unfinished"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the process is as it was


def test_a_signal_after_the_last_step_leaves_the_rest_undone(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    closing = signal_at("SIGINT", hook="validation_batch", step=10, fn="validate")
    stopped = command_line("fit", *fit_args, "--test_at_end", "true", *closing)
    assert stopped.code == 130
    record = stopped.run().read()
    assert record["status"] == "finished"
    assert "results" not in record
    assert "test_openings" not in record
    assert "validate --config" in stopped.out
    config = stopped.run().path / "config.yaml"
    args = ["--config", config, "--trainer.callbacks", "null", "--ckpt_path", "last"]
    closed = command_line("fit", *args, root=False)
    assert closed.code == 0, closed.err
    assert [r["split"] for r in stopped.run().read()["results"]] == ["validation", "test"]
    assert stopped.run().read()["results"][0]["checkpoint"] == stopped.run().read()["best"]
    again = command_line("fit", *args, root=False)
    assert again.code == 0 and len(stopped.run().read()["results"]) == 2


def test_slurm_is_asked_for_a_requeue_and_the_same_command_line_goes_on(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = command_line("fit", *fit_args, "--name", "straight")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'asked'}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for key, value in {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "tune")
    stopped = command_line("fit", *fit_args, *signal_at("SIGUSR1", step=5))
    assert stopped.code == 143, stopped.err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    requeued = command_line("fit", *fit_args)
    assert requeued.code == 0, requeued.err
    assert "SLURM started job 77 again" in requeued.out
    assert_same_run(straight, requeued)


@pytest.mark.parametrize("fault", ["damaged", "unrecorded"])
def test_a_requeued_job_goes_on_from_the_newest_whole_checkpoint_of_its_folder(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Killed between a checkpoint's rename and its record, or with a last one that the disk did not keep."""
    args = [*fit_args, "--checkpoint.every", "1", "--checkpoint.keep", "9"]
    straight = command_line("fit", *args, "--name", "straight")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = command_line("fit", *args, *signal_at("SIGTERM", step=6)).run()
    *before, newest = run.read()["checkpoints"]
    if fault == "unrecorded":
        run.update({"checkpoints": before, "last": before[-1]["name"]})
    else:
        (run.checkpoints / newest["name"] / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    requeued = command_line("fit", *args)
    assert requeued.code == 0, requeued.err
    assert run.read()["starts"][-1]["from_step"] == (6 if fault == "unrecorded" else 5)
    assert_same_run(straight, requeued)


def test_slurm_is_not_asked_for_a_requeue_after_sigterm(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("fine_tune.runs.slurm.requeue", asked.append)
    assert command_line("fit", *fit_args, *signal_at("SIGTERM", step=3)).code == 143
    assert not asked


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    fit_args: list[str], tmp_path: Path, rank: int
) -> None:
    process = start([*fit_args, *SLOW, *TWO], tmp_path)
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_0")
    wait_for_step(run, 2)
    os.kill(rank_pid(process.pid, rank), signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    record = run.read()
    assert record["status"] == "stopped"
    assert record["last"].endswith(f"step={record['step']}")
    assert out.count("resume: ") == 1
