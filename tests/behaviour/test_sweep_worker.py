"""A worker of a sweep: which trials it takes, ends early, gives back, and how it ranks them."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError

from fine_tune.errors import UserError
from fine_tune.sweeps import driver, study
from fine_tune.sweeps.driver import Worker, best_first
from fine_tune.sweeps.space import Sweep
from fine_tune.sweeps.study import number_of, open_storage, open_study, retried, trials_of
from fine_tune.sweeps.trial import EndedEarly, Measured, Runs, TrialFailed

FLOATS = {"lr": optuna.distributions.FloatDistribution(0.0, 1.0)}
IDENTITY = {"data": "a", "config": "b", "sweep file": "c"}


def opened(folder: Path, sweep: Sweep, **changed: Any) -> optuna.Study:
    given = {"identity": IDENTITY, "first": [], "seed": 0, "num_steps": 10, **changed}
    storage = open_storage(f"sqlite:///{folder / 'study.db'}", 2)
    return open_study(storage, "s", sweep, **given)


def worker(
    of: optuna.Study, sweep: Sweep, num_trials: int, said: list[str] | None = None
) -> Worker:
    runs = Runs(Path("unused"), [], "unused", (1,))
    said = [] if said is None else said
    return Worker(of, sweep, runs, num_trials, said.append, lambda _: None)


def pretend(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(driver, "run_setting", run)


def test_as_many_trials_as_asked_for_the_shipped_setting_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"}, pruner="none")
    pretend(monkeypatch, lambda *given: Measured([{"val/loss": given[2]["lr"]}], ["r"]))
    of = opened(tmp_path, sweep, first=[{"lr": 0.25}])
    worker(of, sweep, 6).work()
    assert [number_of(t) for t in trials_of(of)] == list(range(6))
    assert of.trials[0].params == {"lr": 0.25}
    worker(of, sweep, 6).work()  # nothing is left to do
    worker(of, sweep, 8).work()
    assert len(of.trials) == 8


def test_a_hopeless_trial_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"})
    told: list[tuple[int, int]] = []

    def run(*given: Any) -> Measured:
        _, number, _, _, seen = given
        value = 10.0 if number == 6 else 1.0 - number / 100
        for step in (1, 2, 3):
            told.append((number, step))
            if seen(step, value):
                raise EndedEarly
        return Measured([{"val/loss": value}], ["r"])

    pretend(monkeypatch, run)
    of = opened(tmp_path, sweep)
    worker(of, sweep, 7).work()
    states = [trial.state for trial in trials_of(of)]
    assert states == [TrialState.COMPLETE] * 6 + [TrialState.PRUNED]
    assert [step for number, step in told if number == 6] == [1]


def test_a_failed_run_says_why_and_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"}, pruner="none")

    def run(_: Any, number: int, *__: Any) -> Measured:
        if number == 1:
            raise TrialFailed("non-finite loss")
        return Measured([{"val/loss": 1.0}], ["r"])

    pretend(monkeypatch, run)
    of = opened(tmp_path, sweep)
    worker(of, sweep, 3).work()
    assert [t.user_attrs.get("reason") for t in trials_of(of)] == [None, "non-finite loss", None]


def test_a_stopped_worker_gives_its_trial_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"}, pruner="none")
    taken: list[tuple[int, float]] = []

    def run(_: Any, number: int, setting: Any, *__: Any) -> Measured:
        taken.append((number, setting["lr"]))
        if len(taken) == 2:
            raise KeyboardInterrupt
        return Measured([{"val/loss": 1.0}], ["r"])

    pretend(monkeypatch, run)
    of = opened(tmp_path, sweep)
    with pytest.raises(KeyboardInterrupt):
        worker(of, sweep, 3).work()
    worker(of, sweep, 3).work()
    assert taken[1] == taken[2]  # the same trial, under its first number
    assert [number for number, _ in taken] == [0, 1, 1, 3]  # 2 was the second try of 1
    assert [t.state for t in trials_of(of)] == [TrialState.COMPLETE] * 3


def test_a_trial_of_a_dead_worker_is_taken_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"}, pruner="none")
    of = opened(tmp_path, sweep)
    dead = of.ask(FLOATS)
    of._storage.record_heartbeat(dead._trial_id)  # type: ignore[attr-defined]
    taken: list[int] = []

    def run(_: Any, number: int, *__: Any) -> Measured:
        taken.append(number)
        return Measured([{"val/loss": 1.0}], ["r"])

    pretend(monkeypatch, run)
    worker(of, sweep, 2).work()  # waits for it, until it has given no sign of life for too long
    assert sorted(taken) == [0, 1]
    assert [t.state for t in trials_of(of)] == [TrialState.COMPLETE] * 2


def test_two_workers_that_draw_the_last_trial_at_once_leave_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"}, pruner="none")
    of = opened(tmp_path, sweep)
    other = of.ask(FLOATS)  # drawn by another worker after this one had counted
    pretend(monkeypatch, lambda *_: pytest.fail("a surplus trial was run"))
    worker(of, sweep, 1)._take()
    of.tell(other, 1.0)
    assert [number_of(t) for t in trials_of(of)] == [0]


def test_workers_with_other_data_are_refused(tmp_path: Path) -> None:
    sweep = Sweep(FLOATS, {"val/loss": "minimize"})
    opened(tmp_path, sweep)
    with pytest.raises(UserError, match="begun with another data; its trials cannot be compared"):
        opened(tmp_path, sweep, identity={**IDENTITY, "data": "other"})
    opened(tmp_path, sweep)


def test_a_storage_that_comes_back_is_waited_for() -> None:
    said: list[str] = []
    fails = iter([True, True, False])

    def ask() -> str:
        if next(fails):
            raise OperationalError("SELECT", {}, Exception("no connection to the server"))
        return "answer"

    assert retried(ask, said.append, seconds=10) == "answer"
    assert len(said) == 2
    assert "no connection to the server" in said[0]
    assert said[1] == "the storage is back"


def test_a_storage_that_stays_away_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        raise OperationalError("SELECT", {}, Exception("no connection"))

    monkeypatch.setattr(study.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="could not be reached for 0 seconds: no connection"):
        retried(ask, lambda _: None, seconds=0)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nosuch://x", "is no storage that is known"),
        ("postgresql://me:secret@127.0.0.1:1/x", "cannot be reached"),
    ],
)
def test_a_storage_that_is_not_there_is_named_without_its_password(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        open_storage(url, 60)
    assert "secret" not in str(error.value)


def done(*values: float) -> FrozenTrial:
    return create_trial(values=list(values), params={}, distributions={})


def test_the_best_come_first() -> None:
    trials = [done(3.0), done(1.0), done(2.0)]
    assert [t.values[0] for t in best_first(trials, {"a": "minimize"})] == [1.0, 2.0, 3.0]
    assert [t.values[0] for t in best_first(trials, {"a": "maximize"})] == [3.0, 2.0, 1.0]
    several = [done(1.0, 9.0), done(2.0, 2.0), done(3.0, 3.0), done(5.0, 1.0)]
    ranked = best_first(several, {"a": "minimize", "b": "minimize"})
    assert [t.values for t in ranked] == [[1, 9], [2, 2], [5, 1], [3, 3]]  # 3, 3 is beaten by 2, 2
