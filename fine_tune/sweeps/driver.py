"""A worker of a sweep: takes trials of the study, one after the other, until there are as many as asked for."""

import math
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from fine_tune.sweeps.space import Sweep
from fine_tune.sweeps.study import (
    REASON,
    find_dead,
    frozen,
    is_surplus,
    number_of,
    queue_again,
    retried,
    suggested,
    trials_of,
)
from fine_tune.sweeps.trial import EndedEarly, Measured, Runs, TrialFailed, run_setting

WAIT_SECONDS = 2.0
RUNS, SECONDS = "runs", "seconds"  # what a trial's record has besides its values


class _Surplus(Exception):
    """Other workers have begun all trials there should be."""


class _Stopped(Exception):
    """This worker is stopped by ``cause``; its trial is for whoever comes next."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class Worker:
    """Takes trials until all of a study are done.

    Args:
        study: Shared with other workers, or not.
        sweep: What is searched.
        runs: Where the runs lie, and how they are started.
        num_trials: There should be, of all workers together.
        say: Told what happens, a line each.
        show: Told that a trial of this worker began or ended.
    """

    def __init__(
        self,
        study: Study,
        sweep: Sweep,
        runs: Runs,
        num_trials: int,
        say: Callable[[str], None],
        show: Callable[[list[FrozenTrial]], None],
    ) -> None:
        self.study, self.sweep, self.runs = study, sweep, runs
        self.num_trials, self.say, self.show = num_trials, say, show

    def work(self) -> None:
        """Take trials; wait for those of other workers, whose death puts theirs back into the queue."""
        while True:
            trials = retried(self._living_trials, self.say)
            self.show(trials)
            open_ones = [t for t in trials if not t.state.is_finished()]
            if len(trials) >= self.num_trials and not open_ones:
                return
            waiting = any(t.state == TrialState.WAITING for t in open_ones)
            if waiting or len(trials) < self.num_trials:
                retried(self._take, self.say)
            else:
                time.sleep(WAIT_SECONDS)

    def _living_trials(self) -> list[FrozenTrial]:
        find_dead(self.study)
        return trials_of(self.study)[: self.num_trials]

    def _take(self) -> None:
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(TrialFailed, _Surplus))
        except _Stopped as stopped:
            raise stopped.cause from None

    def _objective(self, trial: Trial) -> list[float]:
        if retried(lambda: is_surplus(self.study, trial, self.num_trials), self.say):
            raise _Surplus
        setting = retried(lambda: suggested(trial, self.sweep), self.say)
        number, start = self._number(trial), time.monotonic()
        self.show(retried(lambda: trials_of(self.study), self.say))
        try:
            measured = run_setting(
                self.runs, number, setting, list(self.sweep.metrics), self._seen_by(trial)
            )
        except EndedEarly:
            self._note(trial, start, None)
            raise optuna.TrialPruned from None
        except TrialFailed as failed:
            self._note(trial, start, None)
            retried(lambda told=str(failed): trial.set_user_attr(REASON, told), self.say)
            raise
        except BaseException as cause:
            queue_again(self.study, trial)
            raise _Stopped(cause) from cause
        self._note(trial, start, measured)
        return measured.means(list(self.sweep.metrics))

    def _number(self, trial: Trial) -> int:
        return int(retried(lambda: number_of(frozen(self.study, trial)), self.say))

    def _seen_by(self, trial: Trial) -> Callable[[int, float], bool]:
        several = len(self.sweep.metrics) > 1
        asked = self.sweep.pruner != "none"

        def seen(step: int, value: float) -> bool:
            if several or not math.isfinite(value):
                return False
            retried(lambda: trial.report(value, step), self.say)
            return asked and bool(retried(trial.should_prune, self.say))

        return seen

    def _note(self, trial: Trial, start: float, measured: Measured | None) -> None:
        def note() -> None:
            trial.set_user_attr(SECONDS, time.monotonic() - start)
            if measured is not None:
                trial.set_user_attr(RUNS, measured.folders)
                trial.set_user_attr("values", measured.values)

        retried(note, self.say)


def best_first(trials: list[FrozenTrial], metrics: dict[str, str]) -> list[FrozenTrial]:
    """Return the finished trials, the best first; of several metrics those that nothing beats in all come first."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    signs = [1.0 if direction == "minimize" else -1.0 for direction in metrics.values()]

    def costs(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def beaten(trial: FrozenTrial) -> bool:
        mine = costs(trial)
        return any(
            costs(other) != mine and all(a <= b for a, b in zip(costs(other), mine, strict=True))
            for other in done
        )

    key: Callable[[FrozenTrial], Any] = lambda t: (beaten(t), *costs(t), number_of(t))  # noqa: E731
    return sorted(done, key=key)
