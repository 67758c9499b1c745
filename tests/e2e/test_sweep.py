"""A sweep is a study whose trials are runs: it finds, goes on, shares, and leaves the test split alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from harness import CommandLine
from optuna.trial import TrialState

from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.run_lock import is_owned
from fine_tune.sweeps.ledger import trials_of

GRID = "sampler: grid\nparameters: {{model.optimizer.lr: {values}}}\n"


def sweep_file(folder: Path, values: str) -> Path:
    file = folder / "rates.yaml"
    file.write_text(GRID.format(values=values))
    return file


def study_of(root: Path, name: str = "rates") -> optuna.Study:
    file = root / "lightning_logs" / "sweeps" / name / "study.db"
    return optuna.load_study(study_name=name, storage=f"sqlite:///{file}")


def runs_of(root: Path, name: str = "rates") -> dict[str, list[RunFolder]]:
    logs = root / "lightning_logs" / "sweeps" / name / "lightning_logs"
    return {
        run.name[run.name.index("trial_") :]: [RunFolder(v) for v in sorted(run.glob("version_*"))]
        for run in sorted(logs.glob("*_trial_*"))
    }


def start(root: Path, args: list[str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "fine_tune", "sweep", *args, *more),
            *("--trainer.default_root_dir", str(root)),
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_the_better_rate_is_found_and_a_failed_trial_is_no_end(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, "[1e-3, 1e-7, 1e20]")
    outcome = command_line("sweep", "--sweep", file, *fit_args)
    assert outcome.code == 0, outcome.err
    best = outcome.root / "lightning_logs" / "sweeps" / "rates" / "best.yaml"
    config = yaml.safe_load(best.read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert f"next: python -m fine_tune fit --config {best}" in outcome.out
    states = [trial.state for trial in study_of(outcome.root).trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert "failed" in outcome.out
    assert "32-true" in study_of(outcome.root).trials[2].user_attrs["reason"]
    for versions in runs_of(outcome.root).values():
        assert len(versions) == 1
        assert "test_openings" not in versions[0].read()  # the test split stays sealed
    again = command_line("sweep", "--sweep", file, *fit_args)  # all is done: nothing is run
    assert again.code == 0, again.err
    assert len(study_of(outcome.root).trials) == 3


@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_with_its_own_runs(fit_args: list[str], tmp_path: Path) -> None:
    file = sweep_file(tmp_path, "[1e-3, 2e-3, 3e-3]")
    args = ["--sweep", str(file), "--grace_seconds", "6", *fit_args, "--checkpoint.every", "2"]
    args += ["--data.epochs", "40"]
    first = start(tmp_path, args)
    wait_for(lambda: "trial_0001_seed_42" in runs_of(tmp_path))
    second_run = runs_of(tmp_path)["trial_0001_seed_42"][0]
    wait_for(lambda: second_run.checkpoint("last") is not None)
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not is_owned(second_run.path))  # its run ends with it
    step = second_run.read()["checkpoints"][-1]["step"]
    assert step < 160
    again = start(tmp_path, args)
    out, _ = again.communicate(timeout=400)
    assert again.returncode == 0, out
    done = [t for t in study_of(tmp_path).trials if t.state == TrialState.COMPLETE]
    assert sorted(t.params["model.optimizer.lr"] for t in done) == [1e-3, 2e-3, 3e-3]
    assert list(runs_of(tmp_path)) == [f"trial_000{i}_seed_42" for i in range(3)]
    assert all(len(versions) == 1 for versions in runs_of(tmp_path).values())
    assert [s["from_step"] for s in second_run.read()["starts"]][-1] >= step  # went on, not anew


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_share_the_trials(fit_args: list[str], tmp_path: Path) -> None:
    file = sweep_file(tmp_path, "[1e-3, 2e-3, 3e-3, 4e-3]")
    workers = [start(tmp_path, ["--sweep", str(file), *fit_args]) for _ in range(2)]
    outputs = [worker.communicate(timeout=500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    trials = trials_of(study_of(tmp_path))
    assert sorted(t.params["model.optimizer.lr"] for t in trials) == [1e-3, 2e-3, 3e-3, 4e-3]
    assert all(t.state == TrialState.COMPLETE for t in trials)
    assert "Traceback" not in "".join(outputs)
    assert all(len(versions) == 1 for versions in runs_of(tmp_path).values())


def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "s.yaml"
    for text, told in [
        ("parameters: {model.optimizer.rate: [1]}", "rate"),
        ("parameters: {data.batch_size: [8, 0]}", "batch_size"),
        ("metrics: {val/los: minimize}\nparameters: {data.batch_size: [8]}", "'val/loss'"),
    ]:
        file.write_text(text)
        outcome = command_line("sweep", "--sweep", file, *fit_args)
        assert outcome.code == 2
        assert "s.yaml" in outcome.err
        assert told in outcome.err
        assert "Traceback" not in outcome.err
        assert not (outcome.root / "lightning_logs" / "sweeps").exists()
    file.write_text("parameters: {data.batch_size: [8]}")
    outcome = command_line("sweep", "--sweep", file, *fit_args, "--storage", "nosuch://x")
    assert outcome.code == 2
    assert "--storage: 'nosuch://x' cannot be reached" in outcome.err
    assert not (outcome.root / "lightning_logs" / "sweeps").exists()


def test_a_stopped_sweep_says_so_and_a_half_measured_run_is_measured(
    fit_args: list[str], tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, "[1e-3]")
    args = ["--sweep", str(file), *fit_args, "--data.epochs", "40", "--checkpoint.every", "2"]
    first = start(tmp_path, args)
    wait_for(lambda: any(v[0].checkpoint("last") for v in runs_of(tmp_path).values()))
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=200)
    assert first.returncode == 143, out
    assert "Traceback" not in out
    run = runs_of(tmp_path)["trial_0000_seed_42"][0]
    assert run.read()["status"] == "stopped"
    run.update({"status": "finished"})  # as if it had ended while its result was measured
    again = start(tmp_path, args)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0, out
    assert [r["split"] for r in run.read()["results"]] == ["validation"]


@pytest.mark.slow
def test_seeds_are_told_apart_and_the_winner_alone_is_tested(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        "sampler: grid\nmetrics: {val/loss: minimize, seconds: minimize}\nseeds: [1, 2, 3]\n"
        "parameters: {model.optimizer.lr: [1e-3, 1e-9]}\n"
    )
    outcome = command_line("sweep", "--sweep", file, *fit_args, "--test_winner")
    assert outcome.code == 0, outcome.err
    assert "worse than the config's own setting" in outcome.out
    runs = runs_of(outcome.root)
    assert list(runs) == [f"trial_000{i}_seed_{seed}" for i in (0, 1) for seed in (1, 2, 3)]
    tested = [name for name, (run,) in runs.items() if "test_openings" in run.read()]
    assert tested in (["trial_0000_seed_1"], ["trial_0001_seed_1"])  # none beats both in all
    assert np.load(runs["trial_0000_seed_1"][0].path / "validation_rows.npy").shape[1] == 3
    again = command_line("sweep", "--sweep", file, *fit_args, "--test_winner")
    assert again.code == 0, again.err
    openings = [run.read().get("test_openings", []) for (run,) in runs_of(outcome.root).values()]
    assert sum(map(len, openings)) == 1


def wait_for(ready: Callable[[], bool], seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.3)
