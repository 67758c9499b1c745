"""A sweep from its command to its end: what is searched, the study, the trials, the best setting."""

import argparse
import shlex
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.study import Study
from optuna.trial import FrozenTrial
from rich.console import Console

from fine_tune.cli import main as run_cli
from fine_tune.errors import UserError
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit
from fine_tune.provenance import without_secrets
from fine_tune.report.words import Language
from fine_tune.runs.run_folder import LOGS, RunFolder, check_name
from fine_tune.saved_config import save_config
from fine_tune.sweeps.checks import check_corners, check_metrics, identity_of, shipped_setting
from fine_tune.sweeps.compare import Difference, against_shipped
from fine_tune.sweeps.driver import RUNS, Worker, best_first
from fine_tune.sweeps.ledger import Ledger, number_of
from fine_tune.sweeps.page import write_sweep_page
from fine_tune.sweeps.shown import LiveTable, told_difference, trials_table
from fine_tune.sweeps.space import Setting, Sweep, read_sweep
from fine_tune.sweeps.study import ID, Patience, open_storage, open_study
from fine_tune.sweeps.trial import Runs, flags_of
from fine_tune.sweeps.wandb_file import write_wandb

FOLDER, OUTPUT, BEST, WANDB = "sweeps", "output", "best.yaml", "wandb_sweep.yaml"
DEFAULT_TRIALS, SHOWN_DIFFERENCES, LEAST_GRACE = 20, 5, 3
TESTED = "tested"


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
    if own.grace_seconds < LEAST_GRACE:
        raise UserError(f"--grace_seconds: must be at least {LEAST_GRACE}, got {own.grace_seconds}")
    plan = prepare_as_fit(settings)
    check_metrics(own.sweep, searched, plan)
    check_corners(own.sweep, searched, settings)
    folder = plan.root.absolute() / LOGS / FOLDER / name
    shipped = shipped_setting(plan, searched)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with LiveTable(console, searched, num_trials) as table:
        patience = Patience(table.say)
        study, lock = _opened(own, folder, name, searched, plan, shipped, patience)
        runs = Runs(
            folder,
            f"{name[:24]}_{study.user_attrs[ID]}_",
            settings,
            str(Path(plan.settings.data.init_args.cache_dir).absolute()),
            searched.seeds or (int(plan.settings.seed_everything),),
        )
        each = f"{len(runs.seeds)} runs each, " if len(runs.seeds) > 1 else ""
        table.say(f"sweep {name}: {num_trials} trials, {each}in {folder}")
        ledger = Ledger(
            study,
            searched,
            num_trials,
            seed=own.sampler_seed,
            grace_seconds=own.grace_seconds,
            patience=patience,
            lock=lock,
        )
        Worker(ledger, searched, runs, table.say, table.show).work()
        trials = ledger.trials()
    _finish(study, trials, searched, plan, folder, console, settings, shipped, patience)
    if own.test_winner:
        winner = best_first(trials, searched.metrics)[0]
        if patience(lambda: _is_first(study, winner, lock)):
            _test(RunFolder(Path(winner.user_attrs[RUNS][0])))


def _opened(
    own: argparse.Namespace,
    folder: Path,
    name: str,
    searched: Sweep,
    plan: PreparedCLI,
    shipped: list[Setting],
    patience: Patience,
) -> tuple[Study, AbstractContextManager[Any]]:
    storage = None if own.storage is None else open_storage(own.storage, own.grace_seconds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be made: {error.strerror}") from error
    lock: AbstractContextManager[Any] = nullcontext()
    if storage is None or own.storage.startswith("sqlite"):
        lock = FileLock(folder / "study.lock")
    with lock:
        if storage is None:
            storage = open_storage(f"sqlite:///{folder / 'study.db'}", own.grace_seconds)
        study = patience(
            lambda: open_study(
                storage,
                name,
                searched,
                identity=identity_of(own.sweep, plan),
                first=searched.all_settings() if searched.sampler == "grid" else shipped,
                num_steps=plan.plan.num_steps,
                study_id=uuid.uuid4().hex[:6],
            )
        )
    return study, lock


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
    trials: list[FrozenTrial],
    searched: Sweep,
    plan: PreparedCLI,
    folder: Path,
    console: Console,
    settings: list[str],
    shipped: list[Setting],
    patience: Patience,
) -> None:
    ranked = best_first(trials, searched.metrics)
    against: dict[int, Difference] = against_shipped(trials, shipped)
    console.print(trials_table([*ranked, *(t for t in trials if t not in ranked)], searched))
    for trial in ranked[:SHOWN_DIFFERENCES]:
        if trial.number in against:
            console.print(told_difference(number_of(trial), against[trial.number]))
    if not ranked:
        raise UserError(f"no trial came to a value; what each of them said: {folder / OUTPUT}")
    winner, best, wandb = ranked[0], folder / BEST, folder / WANDB
    write_best(plan, winner.params, best)
    write_wandb(searched, folder.name, without_secrets(settings), wandb)
    run = winner.user_attrs[RUNS][0]
    commands = [
        f"python -m fine_tune fit --config {shlex.quote(str(best))}",
        f"python -m fine_tune test --config {shlex.quote(f'{run}/config.yaml')} --ckpt_path best",
        f"python -m fine_tune report {shlex.quote(run)}",
        f"wandb sweep {shlex.quote(str(wandb))}",
    ]
    language: Language = plan.settings.report or "en"
    page = patience(
        lambda: write_sweep_page(study, trials, searched, folder, commands, against, language)
    )
    console.print(f"best: trial {number_of(winner)}, {run}")
    console.print(f"next: {commands[0]}")
    for command in commands[1:]:
        console.print(f"      {command}")
    console.print(f"report: {page}")


def _is_first(study: Study, winner: FrozenTrial, lock: AbstractContextManager[Any]) -> bool:
    """Whether no worker has tested this winner yet; from now on one has."""
    with lock:
        if study.user_attrs.get(TESTED) == winner.number:
            return False
        study.set_user_attr(TESTED, winner.number)
        return True


def _test(run: RunFolder) -> None:
    config = run.path / "config.yaml"
    if not config.is_file():
        raise UserError(f"--test_winner: '{run.path}' is not on this machine; test it on its own")
    code = run_cli(["test", "--config", str(config), "--ckpt_path", "best"])
    if code:
        raise UserError(f"--test_winner: test ended with exit code {code}")


def write_best(plan: PreparedCLI, setting: Setting, file: Path) -> None:
    """Write the config with a setting in it, ready for ``fit``."""
    best = prepare_as_fit([*plan.args_given[1:], *flags_of(setting)])
    save_config(best._parser("fit"), best.settings, file, ckpt_path=None, config=None)
