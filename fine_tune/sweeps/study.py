"""The study behind a sweep: an Optuna study that any number of workers share, of which no trial is lost or done twice.

A trial of Optuna is one setting. One whose worker died is queued again by heartbeat, as a new trial that remembers the
number of the first; here both are one trial, known by that first number.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from fine_tune.errors import UserError
from fine_tune.sweeps.space import Sweep

STORAGE_SECONDS = 600  # that a storage may be down, in the middle
SURPLUS, REASON, IDENTITY, READY = "surplus", "reason", "identity", "ready"
STARTUP_TRIALS = 5  # drawn by chance, before the sampler and the pruner know anything
Setting = dict[str, Any]


def open_storage(url: str, grace_seconds: int) -> Any:
    """Connect to where the study is kept.

    Args:
        url: ``sqlite:///file`` or ``postgresql://user:password@host/database``.
        grace_seconds: Without a sign of life of a worker, after which its trial is run again.

    Raises:
        UserError: It cannot be reached, or is of an unknown kind.
    """
    address = url.replace("postgresql://", "postgresql+psycopg://", 1)  # the driver of our extra
    options = (
        {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    )
    try:
        with _quiet():
            return RDBStorage(
                address,
                engine_kwargs=options,
                heartbeat_interval=max(1, grace_seconds // 6),
                grace_period=grace_seconds,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(
            f"--storage: '{_without_password(url)}' is no storage that is known: {_told(error)}; give "
            "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from error
    except ImportError as error:
        raise UserError(
            f"--storage: '{_without_password(url)}' needs a package: {error}; pip install 'fine-tune[sweep]'"
        ) from error
    except SQLAlchemyError as error:
        raise UserError(
            f"--storage: '{_without_password(url)}' cannot be reached: {_told(error)}"
        ) from error


def open_study(
    storage: Any,
    name: str,
    sweep: Sweep,
    *,
    identity: dict[str, str],
    first: list[Setting],
    seed: int,
    num_steps: int,
) -> Study:
    """Open the study of this name, or make it.

    Args:
        storage: Of ``open_storage``.
        name: The sweep's.
        sweep: What is searched.
        identity: What must be the same for all workers: data, config, sweep file.
        first: Settings that are tried first, all of them in a grid.
        seed: The sampler's.
        num_steps: Of a run: what Hyperband spends at most.

    Raises:
        UserError: A study of this name is there, and of other data, another config or another sweep file.
    """
    with _quiet():
        sampler, pruner = _sampler(sweep, seed), _pruner(sweep, num_steps)
        directions: Any = list(sweep.metrics.values())
        given: Any = {"study_name": name, "storage": storage, "sampler": sampler, "pruner": pruner}
        try:
            study = optuna.create_study(**given, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(**given)
            _wait_until_ready(study)
    known = study.user_attrs.get(IDENTITY, {})
    different = [key for key, value in identity.items() if known.get(key, value) != value]
    if different:
        raise UserError(
            f"--name: the study '{name}' was begun with another {' and another '.join(different)}; its trials cannot "
            "be compared with yours: start this worker with the same, or give another --name"
        )
    if READY not in study.user_attrs:
        study.set_user_attr(IDENTITY, identity)
        for setting in first:
            study.enqueue_trial(setting, skip_if_exists=True)
        study.set_user_attr(READY, True)
    return study


def _wait_until_ready(study: Study, seconds: int = 30) -> None:
    """Wait for the worker that made the study a moment ago; if it is gone, the caller finishes it."""
    for _ in range(seconds):
        if READY in study.user_attrs:
            return
        time.sleep(1)


def suggested(trial: Trial, sweep: Sweep) -> Setting:
    """Draw a setting, or return the one that a trial of the queue has."""
    setting: Setting = {}
    for key, parameter in sweep.parameters.items():
        if isinstance(parameter, CategoricalDistribution):
            setting[key] = trial.suggest_categorical(key, parameter.choices)
        elif isinstance(parameter, IntDistribution):
            low, high = parameter.low, parameter.high
            setting[key] = trial.suggest_int(key, low, high, step=parameter.step, log=parameter.log)
        else:
            assert isinstance(parameter, FloatDistribution)
            setting[key] = trial.suggest_float(
                key, parameter.low, parameter.high, log=parameter.log
            )
    return setting


def number_of(trial: FrozenTrial) -> int:
    """Return the number a trial is known by: of the first try."""
    with _quiet():
        first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if first is None else int(first)


def frozen(study: Study, trial: Trial) -> FrozenTrial:
    """Return the record of a running trial."""
    return study.get_trials(deepcopy=False)[trial.number]


def trials_of(study: Study) -> list[FrozenTrial]:
    """Return the newest try of each trial, by their numbers; those that were drawn beyond the last one left out."""
    newest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if not trial.user_attrs.get(SURPLUS):
            newest[number_of(trial)] = trial
    return [newest[number] for number in sorted(newest)]


def is_surplus(study: Study, trial: Trial, num_trials: int) -> bool:
    """Whether other workers have begun all trials there should be; noted in the trial, so that it is not counted."""
    numbers = [number_of(other) for other in trials_of(study)]
    if numbers.index(number_of(frozen(study, trial))) < num_trials:
        return False
    trial.set_user_attr(SURPLUS, True)
    return True


def queue_again(study: Study, trial: Trial) -> None:
    """Queue a trial again whose worker is stopped; under its first number, as those of dead workers are."""
    with _quiet():
        RetryHeartbeatStaleTrialCallback()(study, frozen(study, trial))


def find_dead(study: Study) -> None:
    """Queue the trials again whose workers gave no sign of life for too long."""
    with _quiet():
        optuna.storages.fail_stale_trials(study)


def retried(ask: Any, say: Any, seconds: int = STORAGE_SECONDS) -> Any:
    """Ask the storage for something; while it is down, ask again.

    Args:
        ask: What to do.
        say: Told once that it is down, and once that it is back.
        seconds: After which it is given up.

    Raises:
        UserError: It stayed down.
    """
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            answer = ask()
        except (OperationalError, optuna.exceptions.StorageInternalError) as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--storage: it could not be reached for {seconds} seconds: {_told(error)}; what is done is kept: "
                    "run the same command again"
                ) from error
            if not told:
                say(f"WARNING: the storage cannot be reached: {_told(error)}; trying again")
            told = True
            time.sleep(min(5.0, max(0.5, seconds / 20)))
            continue
        if told:
            say("the storage is back")
        return answer


def _sampler(sweep: Sweep, seed: int) -> Any:
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed
        )
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's settings are queued beforehand


def _pruner(sweep: Sweep, num_steps: int) -> Any:
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, num_steps // 9), max_resource=num_steps, reduction_factor=3
        )
    return optuna.pruners.NopPruner()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _told(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.split(':')[0]}@{tail}" if at else url
