"""One setting tried: a run of ``fit`` for each seed, in a process of its own, watched while it validates."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError
from fine_tune.loggers import METRICS_FILE
from fine_tune.runs.places import PARENT_VARIABLE
from fine_tune.runs.run_folder import RunFolder, versions
from fine_tune.runs.run_lock import TAKE_OVER_VARIABLE
from fine_tune.runs.stored_checkpoints import newest_whole
from fine_tune.sweeps.space import COSTS, Setting

OF_A_TRIAL = ["--test_at_end", "false", "--targets", "{}", "--report", "null"]
# Set by what starts several processes as one job; a run of a sweep is a job of its own.
OF_A_JOB = re.compile(r"SLURM_|PMI_|OMPI_|(LOCAL_|NODE_|GROUP_)?RANK$|(LOCAL_)?WORLD_SIZE$|MASTER_")
STOPPED = (130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL, -signal.SIGHUP)
LOOK_SECONDS = 0.5
STOP_SECONDS = 120  # that a run may take to save and end
SHOWN_LINES = 4
SHOWN_CHARACTERS = 500
MEMORY = ("perf/vram_peak_gib", "perf/memory_allocated_gib")


class TrialFailed(Exception):
    """A run of a setting came to nothing; the message says why."""


class RunStopped(Exception):
    """A run was stopped or killed by somebody else; what it saved is there."""


class EndedEarly(Exception):
    """A run was ended early, for its validations promised little."""


@dataclass(frozen=True)
class Runs:
    """Where the runs of a sweep lie, and how they are started.

    Args:
        folder: The sweep's, whose ``lightning_logs`` holds them.
        prefix: Their names begin with: of this study and of no other.
        flags: Of ``fit``: the config and what else was given.
        cache_dir: Where all of them find the prepared data.
        seeds: One run each.
    """

    folder: Path
    prefix: str
    flags: list[str]
    cache_dir: str
    seeds: tuple[int, ...]

    def name(self, number: int, seed: int) -> str:
        """Return the name of a run, the same for every try of its trial."""
        return f"{self.prefix}trial_{number:04d}_seed_{seed}"

    def newest(self, number: int, seed: int) -> RunFolder | None:
        """Return the folder an earlier try left, if there is one."""
        found = versions(self.folder, self.name(number, seed))
        return found[-1] if found else None

    def command(self, number: int, seed: int, setting: Setting) -> list[str]:
        """Return the command line of a run; one that was broken off goes on where it was."""
        there = self.newest(number, seed)
        verb = [sys.executable, "-m", "fine_tune"]
        if there is not None and there.read().get("status") == "finished":  # but not measured
            config = str(there.path / "config.yaml")
            return [*verb, "validate", "--config", config, "--ckpt_path", "best"]
        last = "null"
        if there is not None and there.has_checkpoint():
            with suppress(UserError):  # none of them is whole
                last = str(newest_whole(there, "last")[0])
        return [
            *(*verb, "fit", *self.flags, *flags_of(setting), *OF_A_TRIAL),
            *("--seed_everything", str(seed), "--name", self.name(number, seed)),
            *("--trainer.default_root_dir", str(self.folder), "--data.cache_dir", self.cache_dir),
            *("--ckpt_path", last),
        ]


@dataclass
class Measured:
    """What the runs of a setting came to.

    Args:
        values: Of each run, by the metrics' names.
        folders: Of the runs, in the order of the seeds.
    """

    values: list[dict[str, float]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def means(self, metrics: list[str]) -> list[float]:
        """Return the mean over the seeds of each metric."""
        return [sum(of_run[m] for of_run in self.values) / len(self.values) for m in metrics]


def flags_of(setting: Setting) -> list[str]:
    """Write a setting as flags of ``fit``: 0.0003, true, null, a word as it is."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in setting.items()
    ]


def run_setting(
    runs: Runs,
    number: int,
    setting: Setting,
    metrics: list[str],
    seen: Callable[[int, float], bool],
) -> Measured:
    """Run a setting with every seed.

    Args:
        runs: Where and how.
        number: The trial's.
        setting: Values by the settings' keys.
        metrics: What is measured, the first of them while it trains.
        seen: Told each validation of the first seed, by step and value; True ends the run early.

    Raises:
        TrialFailed: A run failed, or has no finite value; says why.
        RunStopped: Somebody else ended a run.
        EndedEarly: ``seen`` said so.
    """
    measured = Measured()
    for seed in runs.seeds:
        done = runs.newest(number, seed)
        if done is None or not _is_measured(done):
            tell = seen if seed == runs.seeds[0] else lambda *_: False
            _run(runs, number, seed, setting, metrics[0], tell)
            done = runs.newest(number, seed)
        if done is None:
            raise TrialFailed("the run left no folder")
        measured.values.append(_values(done, metrics))
        measured.folders.append(str(done.path))
    return measured


def _run(
    runs: Runs,
    number: int,
    seed: int,
    setting: Setting,
    metric: str,
    seen: Callable[[int, float], bool],
) -> None:
    output = runs.folder / "output" / f"{runs.name(number, seed)}.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "ab") as handle:
        begin = handle.tell()
        process = subprocess.Popen(
            runs.command(number, seed, setting),
            stdout=handle,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
        try:
            ended_early = _watch(process, runs, number, seed, metric, seen)
        except BaseException:  # this worker is stopped: the run saves itself, and goes on later
            stop(process)
            raise
    if ended_early:
        raise EndedEarly
    if process.returncode in STOPPED:
        raise RunStopped(f"its run was ended from outside ({process.returncode})")
    if process.returncode:
        raise TrialFailed(_reason(output, begin, process.returncode))


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not OF_A_JOB.match(name)}
    ours = {PARENT_VARIABLE: str(os.getpid()), TAKE_OVER_VARIABLE: "1", "COLUMNS": "160"}
    return {**own, **ours}


def _is_measured(run: RunFolder) -> bool:
    record = run.read()
    measured = any(result["split"] == "validation" for result in record.get("results", []))
    return record.get("status") == "finished" and measured


def _watch(
    process: subprocess.Popen[bytes],
    runs: Runs,
    number: int,
    seed: int,
    metric: str,
    seen: Callable[[int, float], bool],
) -> bool:
    told: set[int] = set()
    while True:
        over = process.poll() is not None
        folder = runs.newest(number, seed)
        for step, value in validations(folder, metric) if folder is not None else []:
            if step not in told:
                told.add(step)
                if seen(step, value) and not over:
                    stop(process)
                    return True
        if over:
            return False
        time.sleep(LOOK_SECONDS)


def validations(folder: RunFolder, metric: str) -> list[tuple[int, float]]:
    """Return the steps and values of a run's validations until now; the rows of a broken file are left out."""
    found = []
    try:
        with open(folder.path / METRICS_FILE, newline="") as handle:
            for row in csv.DictReader(handle):
                if row.get(metric):
                    found.append((int(row["step"]), float(row[metric])))
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or being written
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run save itself and end; one that does not is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _values(run: RunFolder, metrics: list[str]) -> dict[str, float]:
    record = run.read()
    results = [r["metrics"] for r in record.get("results", []) if r["split"] == "validation"]
    measured = {**(results[-1] if results else {}), **_costs(run, record)}
    missing = [name for name in metrics if name not in measured]
    if missing:
        raise TrialFailed(f"the run has no {missing[0]}; it has {', '.join(measured)}")
    wrong = [name for name in metrics if not math.isfinite(float(measured[name]))]
    if wrong:
        raise TrialFailed(f"{wrong[0]} is {measured[wrong[0]]}")
    return {name: float(measured[name]) for name in metrics}


def _costs(run: RunFolder, record: dict[str, Any]) -> dict[str, float]:
    with open(run.path / METRICS_FILE, newline="") as handle:
        rows = list(csv.DictReader(handle))
    memory = [float(row[name]) for row in rows for name in MEMORY if row.get(name)]
    costs = (float(record.get("seconds", math.nan)), max(memory, default=math.nan))
    return dict(zip(COSTS, costs, strict=True))


def _reason(output: Path, begin: int, code: int) -> str:
    with open(output, "rb") as handle:
        handle.seek(begin)
        lines = handle.read().decode("utf-8", "replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return "; ".join(errors[:SHOWN_LINES])[:SHOWN_CHARACTERS]
    last = [line for line in lines if line.strip()][-1:]
    return f"exit code {code}: {''.join(last)}; all of it: {output}"
