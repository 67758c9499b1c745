"""Killed again and again, a run ends where the straight one does; ``verify-resume`` shows it on the user's config."""

import random
from pathlib import Path

import pytest
from harness import CommandLine, Outcome
from killed_runs import run_all
from test_resume import stop_at

from fine_tune.commands.verify_resume import KillAt, compare
from fine_tune.errors import UserError

DROPOUT = ["--model.config.attention_dropout", "0.1", "--trainer.gradient_clip_val", "1.0"]
KILL = ["--trainer.callbacks.kill", "true"]


def assert_equal(outcome: Outcome, name: str = "run") -> None:
    verdicts = compare(outcome.run("straight"), outcome.run(name))
    assert len(verdicts) == 4
    assert not [verdict for verdict in verdicts if verdict.differs]


def kill_resume_cycles(fit_args: list[str], root: Path, kills: list[int], every: int) -> list[int]:
    """Run straight; then run and be killed after each of these steps, and go on to the end."""
    args = [*fit_args, *DROPOUT, "--checkpoint.every", str(every)]
    args = ["fit", *args, "--trainer.default_root_dir", str(root)]
    resume = ["--ckpt_path", "last"]
    killed = [
        [*args, *stop_at(step), *KILL, *(resume if i else [])] for i, step in enumerate(kills)
    ]
    return run_all([[*args, "--name", "straight"], *killed, [*args, *resume]])


def random_kills(fit_args: list[str], root: Path, seeds: range) -> None:
    args = [*fit_args, *DROPOUT, "--checkpoint.every", "3"]
    args = ["fit", *args, "--trainer.default_root_dir", str(root)]
    command_lines, codes = [[*args, "--name", "straight"]], [0]
    for seed in seeds:
        name = ["--name", f"seed{seed}"]
        step = random.Random(seed).randint(4, 10)
        command_lines += [
            [*args, *name, *stop_at(step), *KILL],
            [*args, *name, "--ckpt_path", "last"],
        ]
        codes += [-9, 0]
    assert run_all(command_lines) == codes
    for seed in seeds:
        assert_equal(Outcome(0, "", "", root), f"seed{seed}")


def test_a_sigkill_at_a_random_step_changes_nothing(fit_args: list[str], tmp_path: Path) -> None:
    random_kills(fit_args, tmp_path, range(2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sigkill_at_any_of_twenty_steps_changes_nothing(
    fit_args: list[str], tmp_path: Path
) -> None:
    random_kills(fit_args, tmp_path, range(20))


@pytest.mark.slow
def test_six_kills_in_one_run_change_nothing(fit_args: list[str], tmp_path: Path) -> None:
    kills = list(range(2, 8))  # the save of that very step is lost: every cycle wins one step
    args = [*fit_args, "--trainer.max_steps", "8"]
    assert kill_resume_cycles(args, tmp_path, kills, every=1) == [0, *[-9] * 6, 0]
    assert_equal(Outcome(0, "", "", tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills_in_one_run_change_nothing(fit_args: list[str], tmp_path: Path) -> None:
    kills = list(range(2, 52))
    args = [*fit_args, "--data.epochs", "11", "--trainer.val_check_interval", "10"]
    assert kill_resume_cycles(args, tmp_path, kills, every=1) == [0, *[-9] * 50, 0]
    assert_equal(Outcome(0, "", "", tmp_path))


def test_verify_resume_proves_it_on_the_users_config(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    run = command_line("fit", *fit_args, *DROPOUT, "--trainer.max_steps", "5").run()
    before = (run.path / "run.json").read_bytes()
    where = ["--trainer.default_root_dir", str(tmp_path), "--kill_seed", "3", "--steps", "4"]
    outcome = command_line("verify-resume", "--config", run.path / "config.yaml", *where)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "4 steps, a checkpoint every 2, SIGKILL after step" in outcome.out
    assert outcome.out.count("equal, bit for bit") == 4
    assert "EQUAL: a killed run goes on bit for bit" in outcome.out
    assert (run.path / "run.json").read_bytes() == before
    assert {p.name for p in (tmp_path / "lightning_logs").iterdir()} == {".cache", "run"}


def test_verify_resume_sees_a_difference_of_one_bit(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, "--trainer.max_steps", "3"]
    command_line("fit", *args, "--name", "straight")
    outcome = command_line("fit", *args)
    assert_equal(outcome)
    last = outcome.run().checkpoint("last")
    assert last is not None
    file = last / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    metrics = outcome.run().path / "metrics.csv"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    differs = {v.what: v.differs for v in compare(outcome.run("straight"), outcome.run())}
    assert differs["weights"].startswith("1 differ, first: model.")
    assert "of step 3" in differs["metrics.csv"]
    assert differs["optimizer, schedule"] == differs["rows of every step"] == ""


def test_a_mistake_in_the_config_is_told_before_anything_runs(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    where = ["--trainer.default_root_dir", str(tmp_path)]
    outcome = command_line("verify-resume", *fit_args, *where, "--data.batch_sise", "4")
    assert outcome.code == 2
    assert "did you mean '--data.batch_size'?" in outcome.err
    outcome = command_line("verify-resume", *fit_args, *where, "--steps", "1")
    assert outcome.code == 2
    assert "give at least 2" in outcome.err


def test_what_a_run_that_failed_has_written_is_named(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--trainer.default_root_dir", str(tmp_path), "--steps", "2"]
    defect = ["--trainer.callbacks+=signal_at.Defect", "--trainer.callbacks.step=1"]
    failed = command_line("verify-resume", *args, *defect)
    assert failed.code == 2
    left = next((tmp_path / "lightning_logs").glob(".verify_resume-*"))
    assert f"what was written is in {left}" in failed.err


@pytest.mark.parametrize("steps", ["0", "1", "-3"])
def test_too_few_steps_are_refused(
    command_line: CommandLine, fit_args: list[str], steps: str
) -> None:
    refused = command_line("verify-resume", *fit_args, "--steps", steps)
    assert refused.code == 2
    assert f"steps: a run of {steps} step(s) cannot be killed and resumed" in refused.err


def test_the_callback_that_kills_cannot_be_used_by_accident() -> None:
    with pytest.raises(UserError, match="only verify-resume uses it"):
        KillAt(3)
