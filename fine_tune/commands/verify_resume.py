"""``verify-resume``: train once straight and once killed and resumed, on the user's own config; both must be equal."""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fine_tune.callbacks.step_rows import FOLDER
from fine_tune.errors import UserError
from fine_tune.exits import exit_code
from fine_tune.loggers import METRICS_FILE
from fine_tune.prepared_cli import prepare_as_fit
from fine_tune.runs.checkpoint import TRAINING_STATE
from fine_tune.runs.run_folder import LOGS, RunFolder

DEFAULT_STEPS = 8
SHOWN_LINES = 20
ONLY_HERE = "FINE_TUNE_VERIFY_RESUME"  # set for the one process that is to be killed
HELP = "The other flags are those of fit: --config configs/x.yaml, --data.path rows.jsonl ... (fit --help)."


def main(args: list[str]) -> int:
    """Print the verdict; return 0 if both runs are equal, 1 if not, 2 for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune verify-resume",
        description=__doc__,
        epilog=HELP,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help=f"Steps of each run. Default: {DEFAULT_STEPS}, or all.",
    )
    parser.add_argument(
        "--kill_seed", type=int, default=None, help="Decides the step of the kill. Default: drawn."
    )
    own, settings = parser.parse_known_args(args[1:])
    seed = random.SystemRandom().randrange(10_000) if own.kill_seed is None else own.kill_seed
    equal = [False]

    def verify() -> None:
        equal[0] = verify_resume(settings, own.steps, seed)

    return exit_code(verify) or int(not equal[0])


class KillAt(Callback):
    """Kill the process right after a step. Only ``verify-resume`` can use it.

    Args:
        step: The optimizer step.
    """

    def __init__(self, step: int) -> None:
        if os.environ.get(ONLY_HERE) != str(step):
            raise UserError(
                "trainer.callbacks: KillAt kills the process; only verify-resume uses it"
            )
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Verdict:
    """One line of the table: what was compared, and how it differs (empty: not at all)."""

    what: str
    compared: str
    differs: str


def verify_resume(settings: list[str], steps: int | None, seed: int) -> bool:
    """Run, kill, resume, compare, and print the verdict.

    Args:
        settings: Flags of ``fit``.
        steps: Steps of each run; None for 8, or all there are.
        seed: Decides the step of the kill.

    Returns:
        Whether both runs are equal.

    Raises:
        UserError: What ``fit`` would refuse, or too few steps.
    """
    if steps is not None:
        _check_steps(steps)  # before the data is read
    plan = prepare_as_fit(settings)
    steps = min(DEFAULT_STEPS if steps is None else steps, plan.plan.num_steps)
    _check_steps(steps)
    every = 2 if steps > 3 else 1
    killed_at = random.Random(seed).randint(every + 1, steps)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{steps} steps, a checkpoint every {every}, SIGKILL after step {killed_at} (--kill_seed {seed})"
    )
    logs = plan.root / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=".verify_resume-", dir=logs))
    common = [
        *settings,
        *("--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps)),
        *("--trainer.log_every_n_steps", "1", "--checkpoint.every", str(every)),
        *("--data.cache_dir", str(plan.settings.data.init_args.cache_dir)),
        *("--test_at_end", "false", "--generations.rows", "0", "--report", "null"),
    ]
    try:
        straight, killed = _both_runs(common, killed_at, root / LOGS, console)
    except UserError as error:
        raise UserError(*error.problems, f"verify-resume: what was written is in {root}") from error
    except BaseException:  # Ctrl-C
        shutil.rmtree(root, ignore_errors=True)
        raise
    verdicts = compare(straight, killed)
    console.print(_table(verdicts))
    equal = not any(verdict.differs for verdict in verdicts)
    if equal:
        shutil.rmtree(root)
    console.print(
        "EQUAL: a killed run goes on bit for bit"
        if equal
        else f"DIFFERENT: both runs are in {root} (on a GPU, kernels that are not deterministic differ by themselves; "
        "see trainer.deterministic)"
    )
    return equal


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise UserError(
            f"steps: a run of {steps} step(s) cannot be killed and resumed; give at least 2"
        )


def compare(straight: RunFolder, resumed: RunFolder) -> list[Verdict]:
    """Hold two runs side by side: weights, optimizer and schedule, every logged number but the speed, rows."""
    weights, states, metrics = [], [], []
    for run in (straight, resumed):
        last = run.checkpoint("last")
        assert last is not None
        found = [load_file(file) for file in sorted(last.glob("*.safetensors"))]
        weights.append({name: value for part in found for name, value in part.items()})
        state = torch.load(last / TRAINING_STATE, map_location="cpu", weights_only=True)
        kept = ("optimizer_states", "lr_schedulers")
        states.append(dict(_leaves("", {name: state[name] for name in kept})))
        with open(run.path / METRICS_FILE, newline="") as handle:
            metrics.append(list(csv.DictReader(handle)))
    numbers = [
        {
            f"{name} of step {row['step']}": value
            for row in of_run
            for name, value in row.items()
            if not name.startswith("perf/")
        }
        for of_run in metrics
    ]
    rows = [
        {file.name: file.read_bytes() for file in sorted((run.path / FOLDER).glob("*.bin"))}
        for run in (straight, resumed)
    ]
    return [
        Verdict("weights", f"{len(weights[0]):,} tensors", _difference(*weights)),
        Verdict("optimizer, schedule", f"{len(states[0]):,} values", _difference(*states)),
        Verdict("metrics.csv", f"{len(numbers[0]):,} numbers", _difference(*numbers)),
        Verdict("rows of every step", f"{len(rows[0])} file(s)", _difference(*rows)),
    ]


def _both_runs(
    common: list[str], killed_at: int, logs: Path, console: Console
) -> tuple[RunFolder, RunFolder]:
    new = ["--ckpt_path", "null"]
    _fit([*common, *new, "--name", "straight"])
    console.print("straight run: done")
    kill = [f"--trainer.callbacks+={__name__}.KillAt", "--trainer.callbacks.step", str(killed_at)]
    _fit([*common, *new, "--name", "killed", *kill], {ONLY_HERE: str(killed_at)}, -signal.SIGKILL)
    killed = RunFolder(logs / "killed" / "version_0")
    # by its path: `last` would mean another run where the config is that run's own
    last = killed.checkpoint("last")
    console.print(f"second run: killed, its last checkpoint is {last and last.name}")
    _fit([*common, "--name", "killed", "--ckpt_path", str(last)])
    console.print("second run: resumed and done")
    return RunFolder(logs / "straight" / "version_0"), killed


def _difference(straight: dict[str, Any], resumed: dict[str, Any]) -> str:
    names = sorted({*straight, *resumed})
    different = [n for n in names if not _same(straight.get(n), resumed.get(n))]
    return f"{len(different):,} differ, first: {different[0]}" if different else ""


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (first, second)]
        return torch.equal(*bits)
    return type(first) is type(second) and bool(first == second)


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else None
    )
    if inner is None:
        return [(name, value)]
    return [leaf for key, item in inner for leaf in _leaves(f"{name}/{key}", item)]


def _fit(args: list[str], environment: dict[str, str] | None = None, wanted: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fine_tune", "fit", *args],
        env={**os.environ, "WANDB_MODE": "disabled", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != wanted:
        shown = "\n".join((done.stdout + done.stderr).splitlines()[-SHOWN_LINES:])
        raise UserError(
            f"verify-resume: fit ended with {done.returncode} instead of {wanted}:\n{shown}"
        )


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("compared", "", "verdict"):
        table.add_column(name)
    for verdict in verdicts:
        table.add_row(verdict.what, verdict.compared, verdict.differs or "equal, bit for bit")
    return table
