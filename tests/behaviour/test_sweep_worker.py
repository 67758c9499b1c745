"""A worker of a sweep: which trials it takes, ends early, gives back, loses, and how it ranks them."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError

from fine_tune.errors import UserError
from fine_tune.sweeps import driver
from fine_tune.sweeps.driver import Worker, best_first
from fine_tune.sweeps.ledger import Ledger, number_of, trials_of
from fine_tune.sweeps.space import Sweep
from fine_tune.sweeps.study import Patience, open_storage, open_study
from fine_tune.sweeps.trial import EndedEarly, Measured, Runs, RunStopped, TrialFailed

FLOATS = {"lr": optuna.distributions.FloatDistribution(0.0, 1.0)}
IDENTITY = {"data": "a", "config": "b", "sweep file": "c"}
LOSS = {"val/loss": "minimize"}
FREE = Sweep(FLOATS, LOSS, pruner="none", sampler="random")
GRID = Sweep(
    {"lr": optuna.distributions.CategoricalDistribution((1, 2, 3, 4))},
    LOSS,
    sampler="grid",
    pruner="none",
)
GRACE = 3


def opened(folder: Path, sweep: Sweep = FREE, **changed: Any) -> optuna.Study:
    first = sweep.all_settings() if sweep.sampler == "grid" else []
    given = {"identity": IDENTITY, "first": first, "num_steps": 10, "study_id": "x", **changed}
    return open_study(open_storage(f"sqlite:///{folder / 'study.db'}", GRACE), "s", sweep, **given)


def ledger_of(
    study: optuna.Study, num_trials: int, sweep: Sweep = FREE, seconds: float = 10
) -> Ledger:
    file = str(study._storage._backend.url) if hasattr(study._storage, "_backend") else ""
    lock = FileLock(file.removeprefix("sqlite:///") + ".lock") if file else nullcontext()
    return Ledger(
        study,
        sweep,
        num_trials,
        seed=0,
        grace_seconds=GRACE,
        patience=Patience(lambda _: None, seconds),
        lock=lock,
    )


def work(
    study: optuna.Study, num_trials: int, sweep: Sweep = FREE, ledger: Ledger | None = None
) -> list[str]:
    said: list[str] = []
    ledger = ledger or ledger_of(study, num_trials, sweep)
    runs = Runs(Path("unused"), "x_", [], "unused", (1,))
    Worker(ledger, sweep, runs, said.append, lambda _: None).work()
    return said


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Runs come to the learning rate as their loss; which were asked for, by number and rate."""
    seen: list[tuple[int, float]] = []

    def run(*given: Any) -> Measured:
        seen.append((given[1], given[2]["lr"]))
        return Measured([{"val/loss": float(given[2]["lr"])}], ["r"])

    monkeypatch.setattr(driver, "run_setting", run)
    return seen


def pretend(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Measured]) -> None:
    monkeypatch.setattr(driver, "run_setting", run)


def meanwhile(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> list[int]:
    """Let something happen during the first run; return the trials' numbers; losses count the runs."""
    tries: list[int] = []

    def run(*given: Any) -> Measured:
        tries.append(given[1])
        if len(tries) == 1:
            do()
        return done(float(len(tries)))

    pretend(monkeypatch, run)
    return tries


def done(*values: float) -> Measured:
    return Measured([{"val/loss": value} for value in values], ["r"])


def test_as_many_trials_as_asked_for_the_shipped_setting_first(
    tmp_path: Path, taken: list[tuple[int, float]]
) -> None:
    study = opened(tmp_path, first=[{"lr": 0.25}])
    work(study, 6)
    assert [number for number, _ in taken] == list(range(6))
    assert taken[0] == (0, 0.25)
    work(study, 6)  # nothing is left to do
    assert len(taken) == 6
    work(opened(tmp_path), 8)  # more of them: other settings, after a restart too
    assert len({rate for _, rate in taken}) == 8


def test_two_workers_share_trials_and_draw_different_settings(
    tmp_path: Path, taken: list[tuple[int, float]]
) -> None:
    opened(tmp_path)
    threads = [threading.Thread(target=lambda: work(opened(tmp_path), 12)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(number for number, _ in taken) == list(range(12))
    assert len({rate for _, rate in taken}) == 12


def test_a_grid_is_tried_once_each_also_in_two_parts(
    tmp_path: Path, taken: list[tuple[int, float]]
) -> None:
    work(opened(tmp_path, GRID), 3, GRID)
    assert [rate for _, rate in taken] == [1, 2, 3]
    work(opened(tmp_path, GRID), 4, GRID)
    assert [rate for _, rate in taken] == [1, 2, 3, 4]


def test_a_hopeless_trial_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(FLOATS, LOSS)
    told: list[tuple[int, int]] = []

    def run(*given: Any) -> Measured:
        _, number, _, _, seen = given
        value = 10.0 if number == 6 else 1.0 - number / 100
        for step in (1, 2, 3):
            told.append((number, step))
            if seen(step, value):
                raise EndedEarly
        return done(value)

    pretend(monkeypatch, run)
    study = opened(tmp_path, sweep)
    work(study, 7, sweep)
    states = [trial.state for trial in trials_of(study)]
    assert states == [TrialState.COMPLETE] * 6 + [TrialState.PRUNED]
    assert [step for number, step in told if number == 6] == [1]


def test_a_failed_run_says_why_and_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*given: Any) -> Measured:
        if given[1] == 1:
            raise TrialFailed("non-finite loss")
        return done(1.0)

    pretend(monkeypatch, run)
    study = opened(tmp_path)
    work(study, 3)
    reasons = [t.user_attrs.get("reason") for t in trials_of(study)]
    assert reasons == [None, "non-finite loss", None]


@pytest.mark.parametrize("cause", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_stopped_worker_gives_its_trial_back(
    cause: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, float]] = []

    def run(*given: Any) -> Measured:
        taken.append((given[1], given[2]["lr"]))
        if len(taken) == 2:
            raise cause
        return done(1.0)

    pretend(monkeypatch, run)
    study = opened(tmp_path)
    with pytest.raises(cause):
        work(study, 3)
    work(study, 3)
    assert taken[1] == taken[2]  # the same trial, under its first number
    assert len(taken) == 4
    assert [t.state for t in trials_of(study)] == [TrialState.COMPLETE] * 3


def test_a_run_ended_from_outside_is_tried_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def run(*given: Any) -> Measured:
        tries.append(given[1])
        if given[1] == 0 or len(tries) == 4:
            raise RunStopped("its run was ended from outside (-9)")
        return done(1.0)

    pretend(monkeypatch, run)
    study = opened(tmp_path)
    work(study, 2)
    assert tries[:3] == [0, 0, 0]
    assert tries[3] == tries[4] != 0
    found = trials_of(study)
    assert [t.state for t in found] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "each time" in found[0].user_attrs["reason"]


@pytest.mark.parametrize("dies", ["with a sign of life", "without", "after its end was noted"])
def test_a_trial_of_a_dead_worker_is_taken_by_another(
    dies: str, tmp_path: Path, taken: list[tuple[int, float]]
) -> None:
    study = opened(tmp_path)
    trial = study.ask(FLOATS)
    if dies == "with a sign of life":
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        trial.set_user_attr("alive", True)
    if dies == "after its end was noted":
        study.tell(trial, state=TrialState.FAIL)  # and killed before it was queued again
    work(study, 2)  # waits, until there was no sign of life for too long
    assert sorted(number for number, _ in taken)[0] == 0
    assert len(taken) == 2
    assert dict(taken)[0] == trial.params["lr"]
    assert [t.state for t in trials_of(study)] == [TrialState.COMPLETE] * 2


def test_a_worker_taken_for_dead_leaves_its_trial_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path)
    tries = meanwhile(monkeypatch, lambda: study.tell(0, state=TrialState.FAIL))  # taken for dead
    work(study, 1)
    assert tries == [0, 0]
    assert [t.values for t in trials_of(study)] == [[2.0]]


def test_two_workers_that_draw_the_last_trial_at_once_leave_one(
    tmp_path: Path, taken: list[tuple[int, float]]
) -> None:
    study = opened(tmp_path)
    other = study.ask(FLOATS)  # drawn by another worker after this one had counted
    assert ledger_of(study, 1)._drawn() is None
    study.tell(other, 1.0)
    assert [number_of(t) for t in trials_of(study)] == [0]
    assert taken == []


def test_workers_with_other_data_are_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(UserError, match="begun with another data; its trials cannot be compared"):
        opened(tmp_path, identity={**IDENTITY, "data": "other"})
    assert opened(tmp_path).user_attrs["id"] == "x"


class Away:
    """Makes calls of a storage fail as Optuna says it, for a while or for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: float) -> None:
        self.times = times
        for name in ("set_trial_state_values", "set_trial_user_attr", "record_heartbeat"):
            original = getattr(RDBStorage, name)

            def failing(storage: Any, *args: Any, _do: Any = original, **kwargs: Any) -> Any:
                if self.times > 0:
                    self.times -= 1
                    gone = OperationalError("SELECT", {}, Exception("no connection to the server"))
                    raise StorageInternalError("An exception is raised") from gone
                return _do(storage, *args, **kwargs)

            monkeypatch.setattr(RDBStorage, name, failing)


def test_a_storage_away_while_a_trial_runs_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path)
    away = Away(monkeypatch, 0)
    tries = meanwhile(monkeypatch, lambda: setattr(away, "times", 3))
    work(study, 2)
    assert len(tries) == 2
    assert [t.state for t in trials_of(study)] == [TrialState.COMPLETE] * 2


def test_a_storage_that_stays_away_ends_the_worker_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path)
    pretend(monkeypatch, lambda *_: done(1.0))
    Away(monkeypatch, float("inf"))
    with pytest.raises(UserError, match="for 1 seconds: no connection to the server; what is done"):
        work(study, 2, ledger=ledger_of(study, 2, seconds=1))


def test_after_an_outage_nobody_is_taken_for_dead_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    patience = Patience(said.append, 10)
    fails = iter([True, True, False])

    def ask() -> str:
        if next(fails):
            raise StorageInternalError("x") from OperationalError("SELECT", {}, Exception("gone"))
        return "answer"

    assert patience(ask) == "answer"
    assert said == [
        "WARNING: the storage cannot be reached: gone; trying again",
        "the storage is back",
    ]
    study = opened(tmp_path)
    ledger = ledger_of(study, 1)
    ledger.patience = patience
    looked: list[int] = []
    monkeypatch.setattr(optuna.storages, "fail_stale_trials", lambda _: looked.append(1))
    ledger._mend()
    assert looked == []
    patience.back_since -= GRACE
    ledger._mend()
    assert looked == [1]


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://me:secret@x/y",
        "postgresql://me:secret@127.0.0.1:1/x",
        "postgresql://me:secret@127.0.0.1:port/x",
        "postgresql://me@127.0.0.1:1/x?password=secret",
        "sqlite:////nowhere/secret_{x}.db",
        "no url at all, secret",
    ],
)
def test_a_storage_that_is_not_there_is_named_without_its_password(url: str) -> None:
    with pytest.raises(UserError, match="--storage: ") as error:
        open_storage(url, 60)
    assert "secret" not in str(error.value) or "@" not in url


def finished(*values: float) -> FrozenTrial:
    return create_trial(values=list(values), params={}, distributions={})


def test_the_best_come_first() -> None:
    trials = [finished(3.0), finished(1.0), finished(2.0)]
    assert [t.values[0] for t in best_first(trials, {"a": "minimize"})] == [1.0, 2.0, 3.0]
    assert [t.values[0] for t in best_first(trials, {"a": "maximize"})] == [3.0, 2.0, 1.0]
    several = [finished(1.0, 9.0), finished(2.0, 2.0), finished(3.0, 3.0), finished(5.0, 1.0)]
    ranked = best_first(several, {"a": "minimize", "b": "minimize"})
    assert [t.values for t in ranked] == [[1, 9], [2, 2], [5, 1], [3, 3]]  # 3, 3 is beaten by 2, 2
