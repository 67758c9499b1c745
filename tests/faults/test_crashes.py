"""What dies on its own (an exception, a data worker, a process of several) ends the run clearly, and it resumes."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import CommandLine, Outcome
from processes import SLOW, TWO, assert_same_run, rank_pid, resume, start, wait_for_step

from fine_tune.redaction import redacted
from fine_tune.runs.run_folder import RunFolder

SECRETS = {
    "HF_TOKEN": "hf_canaryCanaryCanaryCanary42",
    "WANDB_API_KEY": "f" * 39 + "e",
    "OPENAI_API_KEY": "sk-canary-for-the-run-folder",
    "DB_PASSWD": "canary of a database",
    "MY_PWD_OF_ALL": "canary-pwd",
    "AWS_CREDENTIAL_FILE_TEXT": "canary/in/no/file",
}


def defect(step: int, message: str = "a defect", where: str = "step") -> list[str]:
    settings = {"step": step, "message": message, "where": where}
    flags = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    return ["--trainer.callbacks+=signal_at.Defect", *flags]


@pytest.mark.parametrize("where", ["forward", pytest.param("step", marks=pytest.mark.slow)])
def test_an_exception_keeps_its_traceback_and_ends_with_the_resume_command(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, where: str
) -> None:
    args = [*fit_args, "--checkpoint.every", "2", "--data.num_workers", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    process = start([*args, *defect(5, where=where)], tmp_path)
    _, err = process.communicate(timeout=100)
    run = straight.run("run")
    assert process.returncode == 1
    assert "RuntimeError: a defect" in err
    config = run.path / "config.yaml"
    last_line = f"resume: python -m fine_tune fit --config {config} --ckpt_path last"
    assert err.strip().splitlines()[-1] == last_line
    assert run.read()["status"] == "failed"
    assert run.read()["last"].endswith("step=4")
    assert "RuntimeError: a defect" in (run.path / "train.log").read_text()
    assert_same_run(straight, resume(command_line, run))


def test_an_exception_is_shown_also_when_the_checkpoint_the_run_began_from_is_replaced(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, "--checkpoint.every", "1", "--data.split", "none"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *defect(3))
    with pytest.raises(RuntimeError, match="the second"):
        command_line("fit", *args, *defect(6, "the second"), "--ckpt_path", "last")


def test_an_exception_before_the_first_checkpoint_says_the_command_that_starts_again(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError) as raised:
        command_line("fit", *fit_args, *defect(2))
    config = tmp_path / "lightning_logs" / "run" / "version_0" / "config.yaml"
    assert raised.value.__notes__ == [f"start again: python -m fine_tune fit --config {config}"]


def test_no_secret_reaches_the_run_folder(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    more = [
        "--purpose",
        f"with {SECRETS['DB_PASSWD']}",
        "--licences",
        f"{{all: {SECRETS['MY_PWD_OF_ALL']}, {SECRETS['OPENAI_API_KEY']}: MIT}}",
    ]
    more += ["--checkpoint.every", "1"]
    monkeypatch.setenv("WANDB_MODE", "offline")  # W&B would keep the process's arguments
    monkeypatch.setattr(sys, "argv", ["fine_tune", "fit", *more])
    with pytest.raises(RuntimeError):
        command_line("fit", *fit_args, *defect(3, message="environment"), *more)
    files = [p for p in (tmp_path / "lightning_logs").rglob("*") if p.is_file()]
    assert {"config.yaml", "run.json", "train.log"} <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    for value in SECRETS.values():
        assert not [file for file in files if value.encode() in file.read_bytes()]
    log = next(file for file in files if file.name == "train.log").read_text()
    assert "RuntimeError: *** ***" in log
    assert "WARNING: purpose, licences: holds the value of a secret environment variable" in log
    config = next(file for file in files if file.name == "config.yaml")
    assert "purpose: with ***" in config.read_text()


@pytest.mark.parametrize("secret", ["32-true", "lightning", "cosine"])
def test_a_secret_that_is_also_a_setting_stops_no_run(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    secret: str,
) -> None:
    monkeypatch.setenv("MY_API_KEY", secret)
    more = ["--trainer.precision", "32-true", "--model.lr_scheduler", "cosine"]
    outcome = command_line("fit", *fit_args, *more, "--trainer.max_steps", "1")
    assert outcome.code == 0, outcome.err
    assert "holds the value of a secret environment variable; config.yaml has ***" in outcome.out
    config = (outcome.run().path / "config.yaml").read_text()
    assert "***" in config and f": {secret}" not in config


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *(
            (name, True)
            for name in (
                "HF_TOKEN",
                "WANDB_API_KEY",
                "APIKEY2",
                "DB_PASSWD",
                "MY_KEYS",
                "APIKEY",
                "S3KEY",
            )
        ),
        *((name, True) for name in ("key", "GITHUB_PAT_TOKEN", "PGPASSWORD", "SNAPSHOTKEY")),
        *((name, False) for name in ("TOKENIZER", "TOKENIZERS_PARALLELISM", "KEYBOARD_LAYOUT")),
        *((name, False) for name in ("MONKEY", "HOTKEY", "DONKEYS", "MY_MONKEY")),
    ],
)
def test_a_name_that_only_begins_like_a_secrets_is_none(
    name: str, is_secret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "owner/some-model")
    assert redacted("from owner/some-model") == (
        "from ***" if is_secret else "from owner/some-model"
    )


def test_a_path_or_the_shells_folder_is_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("PWD", "/of/the/shell")
    assert (
        redacted(f"{tmp_path}/rows.jsonl /of/the/shell") == f"{tmp_path}/rows.jsonl /of/the/shell"
    )


def test_a_killed_data_worker_ends_the_run_with_a_clear_error(
    fit_args: list[str], tmp_path: Path
) -> None:
    process = start([*fit_args, *SLOW, "--data.num_workers", "2"], tmp_path)
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_0")
    wait_for_step(run, 2)
    worker = psutil.Process(process.pid).children()[0]
    worker.kill()
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    assert f"DataLoader worker (pid {worker.pid}) is killed by signal: Killed" in err
    assert "start again: python -m fine_tune fit" in err.splitlines()[-1]


def test_when_one_of_two_processes_is_killed_the_other_ends(
    fit_args: list[str], tmp_path: Path
) -> None:
    kill_one_of_two(fit_args, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_two_processes_of_which_one_was_killed_resumes_bit_for_bit(
    fit_args: list[str], tmp_path: Path, rank: int
) -> None:
    args = [*fit_args, "--checkpoint.every", "2"]
    run = kill_one_of_two(args, tmp_path, rank)
    again = ["--config", str(run.path / "config.yaml"), "--trainer.callbacks", "null"]
    resumed = start([*again, "--ckpt_path", "last"], tmp_path)
    _, err = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, err
    straight = start([*args, *TWO, "--name", "straight"], tmp_path)
    _, err = straight.communicate(timeout=100)
    assert straight.returncode == 0, err
    outcome = Outcome(0, "", "", tmp_path)
    assert_same_run(outcome, outcome)


def kill_one_of_two(args: list[str], tmp_path: Path, rank: int) -> RunFolder:
    process = start([*args, *TWO, *SLOW], tmp_path)
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_0")
    wait_for_step(run, 3)
    pids = [rank_pid(process.pid, 0), rank_pid(process.pid, 1)]
    other = psutil.Process(pids[1 - rank])
    os.kill(pids[rank], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)  # rank 1 shares its output
    other.wait(60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    return run
