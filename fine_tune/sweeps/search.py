"""A sweep from its command to its end: what is searched, the study, the trials, the best setting."""

import argparse
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from rich.console import Console

from fine_tune.cli import main as run_cli
from fine_tune.errors import UserError
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit
from fine_tune.runs.run_folder import LOGS, check_name
from fine_tune.saved_config import save_config
from fine_tune.sweeps.checks import check_corners, check_metrics, identity_of, shipped_setting
from fine_tune.sweeps.driver import RUNS, Worker, best_first
from fine_tune.sweeps.page import write_sweep_page
from fine_tune.sweeps.shown import LiveTable, trials_table
from fine_tune.sweeps.space import Sweep, read_sweep
from fine_tune.sweeps.study import number_of, open_storage, open_study, trials_of
from fine_tune.sweeps.trial import Runs, flags_of
from fine_tune.sweeps.wandb_file import write_wandb

FOLDER, OUTPUT, BEST, WANDB = "sweeps", "output", "best.yaml", "wandb_sweep.yaml"
DEFAULT_TRIALS = 20


def search(own: argparse.Namespace, settings: list[str]) -> None:
    """Open the study, take its trials, and say what came of them.

    Args:
        own: The verb's own flags.
        settings: Flags of ``fit``.

    Raises:
        UserError: What ``fit`` would refuse of any corner of the space, a sweep file that cannot be meant, a study of
            other data, a storage that is not there.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the table says what it would say
    searched = read_sweep(own.sweep)
    name = own.name or Path(own.sweep).stem
    check_name(name)
    num_trials = _num_trials(own.trials, searched)
    if own.grace_seconds < 1:
        raise UserError(f"--grace_seconds: must be at least 1, got {own.grace_seconds}")
    plan = prepare_as_fit(settings)
    check_metrics(own.sweep, searched, plan)
    check_corners(own.sweep, searched, settings)
    folder = plan.root.absolute() / LOGS / FOLDER / name
    if own.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
    shipped = shipped_setting(plan, searched)
    study = open_study(
        open_storage(own.storage or f"sqlite:///{folder / 'study.db'}", own.grace_seconds),
        name,
        searched,
        identity=identity_of(own.sweep, plan),
        first=searched.all_settings() if searched.sampler == "grid" else shipped,
        seed=own.sampler_seed,
        num_steps=plan.plan.num_steps,
    )
    runs = Runs(
        folder,
        settings,
        str(Path(plan.settings.data.init_args.cache_dir).absolute()),
        searched.seeds or (int(plan.settings.seed_everything),),
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    each = f"{len(runs.seeds)} runs each, " if len(runs.seeds) > 1 else ""
    console.print(f"sweep {name}: {num_trials} trials, {each}in {folder}")
    with LiveTable(console, searched, num_trials) as table:
        Worker(study, searched, runs, num_trials, table.say, table.show).work()
    _finish(study, searched, plan, folder, console, settings)
    if own.test_winner:
        winner = best_first(trials_of(study), searched.metrics)[0]
        config = str(Path(winner.user_attrs[RUNS][0]) / "config.yaml")
        run_cli(["test", "--config", config, "--ckpt_path", "best"])


def _num_trials(asked: int | None, searched: Sweep) -> int:
    if asked is not None and asked < 1:
        raise UserError(f"--trials: must be at least 1, got {asked}")
    if searched.sampler == "grid":
        whole = searched.num_settings
        assert whole is not None
        return whole if asked is None else min(asked, whole)
    return DEFAULT_TRIALS if asked is None else asked


def _finish(
    study: Study,
    searched: Sweep,
    plan: PreparedCLI,
    folder: Path,
    console: Console,
    settings: list[str],
) -> None:
    trials = trials_of(study)
    ranked = best_first(trials, searched.metrics)
    console.print(trials_table([*ranked, *(t for t in trials if t not in ranked)], searched))
    if not ranked:
        raise UserError(f"no trial came to a value; what each of them said: {folder / OUTPUT}")
    winner, best, wandb = ranked[0], folder / BEST, folder / WANDB
    write_best(plan, winner.params, best)
    write_wandb(searched, folder.name, settings, wandb)
    run = winner.user_attrs[RUNS][0]
    commands = [
        f"python -m fine_tune fit --config {best}",
        f"python -m fine_tune test --config {run}/config.yaml --ckpt_path best",
        f"python -m fine_tune report {run}",
        f"wandb sweep {wandb}",
    ]
    page = write_sweep_page(study, searched, folder, commands, plan.settings.report or "en")
    console.print(f"best: trial {number_of(winner)}, {run}")
    console.print(f"next: {commands[0]}")
    for command in commands[1:]:
        console.print(f"      {command}")
    console.print(f"report: {page}")


def write_best(plan: PreparedCLI, setting: dict[str, Any], file: Path) -> None:
    """Write the config with a setting in it, ready for ``fit``."""
    best = prepare_as_fit([*plan.args_given[1:], *flags_of(setting)])
    save_config(best._parser("fit"), best.settings, file, ckpt_path=None, config=None)
