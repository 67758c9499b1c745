"""Where a study is kept: the storage, and Optuna's study in it with the sampler and pruner that were asked for."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from fine_tune.errors import UserError
from fine_tune.sweeps.space import Sweep

T = TypeVar("T")
STORAGE_SECONDS = 600.0  # that a storage may be down, in the middle
STARTUP_TRIALS = 5  # drawn by chance, before the sampler and the pruner know anything
SCHEMA_TRIES = 5
IDENTITY, ID, READY = "identity", "id", "ready"
AWAY = (SQLAlchemyError, StorageInternalError, ConnectionError)


def open_storage(url: str, grace_seconds: int) -> RDBStorage:
    """Connect to where the study is kept.

    Args:
        url: ``sqlite:///file`` or ``postgresql://user:password@host/database``.
        grace_seconds: Without a sign of life of a worker, after which its trial is run again.

    Raises:
        UserError: It cannot be reached, or is of an unknown kind.
    """
    shown = f"{url.split('://')[0]}://..." if "@" in url else url  # its password is not known yet
    try:
        address = make_url(url)
        shown = address.set(query={}).render_as_string(hide_password=True)
        if address.drivername == "postgresql":
            address = address.set(drivername="postgresql+psycopg")  # the driver of our extra
        return _connected(address, grace_seconds)
    except ImportError as error:
        raise UserError(
            f"--storage: '{shown}' needs a package: {error}; pip install 'fine-tune[sweep]'"
        ) from error
    except (*AWAY, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--storage: '{shown}' cannot be reached or is of no kind that is known: {told(error)}; give "
            "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from error


def _connected(address: URL, grace_seconds: int) -> RDBStorage:
    local = address.drivername.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if local else {}
    text = address.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for left in reversed(range(SCHEMA_TRIES)):
        try:
            with quiet():
                return RDBStorage(
                    text,
                    engine_kwargs=options if local else {"pool_pre_ping": True},
                    heartbeat_interval=max(1, grace_seconds // 6),
                    grace_period=grace_seconds,
                )
        except AWAY as error:
            another = any(words in str(error) for words in ("already exists", "duplicate key"))
            if not another or not left:  # else another worker is making the tables, too
                raise
            time.sleep(1)
    raise AssertionError


def open_study(
    storage: Any,
    name: str,
    sweep: Sweep,
    *,
    identity: dict[str, str],
    first: list[dict[str, Any]],
    num_steps: int,
    study_id: str,
) -> Study:
    """Open the study of this name, or make it.

    Args:
        storage: Of ``open_storage``.
        name: The sweep's.
        sweep: What is searched.
        identity: What must be the same for all workers, each as a hash.
        first: Settings that are tried first; all of them in a grid.
        num_steps: Of a run: what Hyperband spends at most.
        study_id: Of a new study; the names of its runs have it.

    Raises:
        UserError: A study of this name is there, and was begun with something else.
    """
    given: Any = {"study_name": name, "storage": storage, "pruner": _pruner(sweep, num_steps)}
    directions: Any = list(sweep.metrics.values())
    try:
        study = optuna.create_study(**given, directions=directions)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(**given)
        _wait_until_ready(study)
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, identity)
    known = study.user_attrs[IDENTITY]
    different = [key for key, value in identity.items() if known.get(key) != value]
    if different:
        raise UserError(
            f"--name: the study '{name}' was begun with another {' and another '.join(different)}; its trials cannot "
            "be compared with yours: start this worker with the same, or give another --name"
        )
    if READY not in study.user_attrs:
        study.set_user_attr(ID, study_id)
        there = len(study.get_trials(deepcopy=False))
        for setting in first:
            study.enqueue_trial(setting, skip_if_exists=there > 0)
        study.set_user_attr(READY, True)
    return study


def _wait_until_ready(study: Study, seconds: int = 30) -> None:
    """Wait for the worker that is making the study; if it is gone, the caller finishes it."""
    seen, left = -1, seconds
    while READY not in study.user_attrs and left > 0:
        there = len(study.get_trials(deepcopy=False))
        seen, left = there, seconds if there > seen else left - 1
        time.sleep(1)


def sampler_of(sweep: Sweep, seed: int) -> Any:
    """Return the sampler; a grid's settings are queued beforehand, and need none."""
    if sweep.sampler == "tpe":
        with quiet():
            return optuna.samplers.TPESampler(
                n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed
            )
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep, num_steps: int) -> Any:
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, num_steps // 9), max_resource=num_steps, reduction_factor=3
        )
    return optuna.pruners.NopPruner()


class Patience:
    """Asks a storage again while it is down, for a while.

    Args:
        say: Told once that it is down, and once that it is back.
        seconds: After which it is given up.
    """

    def __init__(self, say: Callable[[str], None], seconds: float = STORAGE_SECONDS) -> None:
        self.say, self.seconds = say, seconds
        self.back_since = 0.0  # when it came back, by the monotonic clock

    def __call__(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer.

        Raises:
            UserError: The storage stayed down.
        """
        down_since = None
        while True:
            try:
                answer = ask()
            except AWAY as error:
                now = time.monotonic()
                if down_since is None:
                    self.say(f"WARNING: the storage cannot be reached: {told(error)}; trying again")
                down_since = now if down_since is None else down_since
                if now - down_since >= self.seconds:
                    raise UserError(
                        f"--storage: it could not be reached for {self.seconds:.0f} seconds: {told(error)}; what is "
                        "done is kept: run the same command again"
                    ) from error
                time.sleep(min(5.0, self.seconds / 20))
                continue
            if down_since is not None:
                self.back_since = time.monotonic()
                self.say("the storage is back")
            return answer


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Optuna says of its experimental parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def told(error: BaseException) -> str:
    """Return the one line that says what went wrong: of the database, not of those who wrapped it."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error)
    return text.splitlines()[0] if text else type(error).__name__
