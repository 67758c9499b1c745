"""Who has which trial of a study: none is lost, none done twice, however many workers there are and whenever they die.

A trial of Optuna is one try of a trial; all tries of one carry the number of the first. A try that ended without
value or reason was broken off, and the trial is queued again. Of tries that ran at once, the first one counts.
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from fine_tune.sweeps.space import Setting, Sweep
from fine_tune.sweeps.study import AWAY, Patience, quiet, sampler_of

FIRST, ALIVE, SURPLUS, REASON = "first", "alive", "surplus", "reason"
QUEUED_SETTING = "fixed_params"  # where Optuna keeps what was queued


class Lost(Exception):
    """Another worker has the trial: this one gave no sign of life for too long."""


@dataclass(frozen=True)
class Taken:
    """A trial that this worker has.

    Args:
        trial: Optuna's.
        number: The trial's own.
        setting: To try.
        num_tries: With this one.
    """

    trial: Trial
    number: int
    setting: Setting
    num_tries: int


class Ledger:
    """Hands out trials and writes down what came of them; while the storage is down, it waits.

    Args:
        study: Shared with other workers, or not.
        sweep: What is searched.
        num_trials: There should be, of all workers together.
        seed: Of the sampler.
        grace_seconds: Without a sign of life, after which a trial is somebody else's.
        patience: How long to wait for the storage.
        lock: Entered around what Optuna's SQLite cannot keep apart.
    """

    def __init__(
        self,
        study: Study,
        sweep: Sweep,
        num_trials: int,
        *,
        seed: int,
        grace_seconds: int,
        patience: Patience,
        lock: AbstractContextManager[Any],
    ) -> None:
        self.study, self.sweep, self.num_trials, self.seed = study, sweep, num_trials, seed
        self.grace_seconds, self.patience, self._lock = grace_seconds, patience, lock
        self._bare: dict[int, float] = {}  # running tries without a sign of life -> seen since

    def trials(self) -> list[FrozenTrial]:
        """Return the try that counts of each trial there should be, by their numbers."""
        return self.patience(lambda: trials_of(self.study))[: self.num_trials]

    def take(self) -> Taken | None:
        """Take a trial of the queue, or draw one; None while there is nothing to take."""

        def take() -> Taken | None:
            with self._lock:
                self._mend()
                trials = trials_of(self.study)
                waiting = any(t.state == TrialState.WAITING for t in trials[: self.num_trials])
                return self._drawn() if waiting or len(trials) < self.num_trials else None

        return self.patience(take)

    def _drawn(self) -> Taken | None:
        trial = self.study.ask()
        self._beat(trial)
        trial.set_user_attr(ALIVE, True)
        tries = self.study.get_trials(deepcopy=False)
        own = tries[trial.number]
        number = number_of(own)
        others = [t for t in tries if number_of(t) == number and t.number != own.number]
        beyond = [number_of(t) for t in trials_of(self.study)].index(number) >= self.num_trials
        if beyond or any(_counts_before(other, own) for other in others):
            trial.set_user_attr(SURPLUS, True)
            self.study.tell(trial, state=TrialState.FAIL)
            if beyond and QUEUED_SETTING in own.system_attrs:
                self.study.enqueue_trial(own.system_attrs[QUEUED_SETTING])
            return None
        # a sampler of its own for each trial: all workers, and every restart, would draw the same ones
        name = f"{self.seed} {number}".encode()
        self.study.sampler = sampler_of(self.sweep, zlib.crc32(name))
        return Taken(trial, number, _suggested(trial, self.sweep), len(others) + 1)

    def _mend(self) -> None:
        """Queue again what dead workers had; not right after an outage, in which nobody could show any life."""
        now = time.monotonic()
        if now >= self.patience.back_since + self.grace_seconds or not self.patience.back_since:
            with quiet():
                optuna.storages.fail_stale_trials(self.study)
            running = [
                t
                for t in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                if not t.user_attrs.get(ALIVE)
            ]
            self._bare = {t.number: self._bare.get(t.number, now) for t in running}
            for bare in running:
                if now - self._bare[bare.number] > self.grace_seconds:
                    self.study.tell(bare.number, state=TrialState.FAIL)
        tries = self.study.get_trials(deepcopy=False)
        newest = {number_of(t): t.number for t in tries if not t.user_attrs.get(SURPLUS)}
        for broken_off in tries:
            if broken_off.number == newest.get(number_of(broken_off)) and is_open(broken_off):
                self._queue(broken_off)

    def _queue(self, broken_off: FrozenTrial) -> None:
        system = {k: v for k, v in broken_off.system_attrs.items() if k == QUEUED_SETTING}
        self.study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=broken_off.params,
                distributions=broken_off.distributions,
                user_attrs={FIRST: number_of(broken_off)},
                system_attrs=system,
            )
        )

    @contextmanager
    def alive(self, taken: Taken) -> Iterator[None]:
        """Give signs of life for a trial, through outages too."""
        over = threading.Event()
        every = max(0.5, self.grace_seconds / 6)

        def beat() -> None:
            while not over.wait(every):
                try:
                    self._beat(taken.trial)
                except AWAY:
                    continue  # it will be back, or the worker will give up

        thread = threading.Thread(target=beat, daemon=True, name="signs-of-life")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(every)

    def _beat(self, trial: Trial) -> None:
        storage: Any = self.study._storage
        storage.record_heartbeat(trial._trial_id)

    def report(self, taken: Taken, step: int, value: float) -> bool:
        """Note a validation; return whether the trial promises little.

        Raises:
            Lost: Another worker has it.
        """

        def report() -> bool:
            taken.trial.report(value, step)
            return taken.trial.should_prune()

        return self._unless_lost(report)

    def end(self, taken: Taken, state: TrialState, values: Any = None, **notes: Any) -> None:
        """Write down what came of a trial.

        Args:
            taken: The trial.
            state: COMPLETE with ``values``, PRUNED, or FAIL with a ``reason``; a FAIL without one is tried again.
            values: Of the metrics.
            notes: Kept with it.

        Raises:
            Lost: Another worker has it.
        """

        def end() -> None:
            for name, note in notes.items():
                taken.trial.set_user_attr(name, note)
            self.study.tell(taken.trial, values, state=state)

        self._unless_lost(end)

    def let_go(self, taken: Taken) -> None:
        """Give a trial back, without waiting: where that fails, it is found by its missing signs of life."""
        with suppress(*AWAY, UpdateFinishedTrialError, ValueError):
            self.study.tell(taken.trial, state=TrialState.FAIL)

    def _unless_lost(self, do: Callable[[], Any]) -> Any:
        def once() -> Any:
            try:
                return do()
            except UpdateFinishedTrialError as error:
                raise Lost from error
            except ValueError as error:
                if "Cannot tell" in str(error):
                    raise Lost from error
                raise

        return self.patience(once)


def number_of(trial: FrozenTrial) -> int:
    """Return the number a trial is known by: of its first try."""
    return int(trial.user_attrs.get(FIRST, trial.number))


def trials_of(study: Study) -> list[FrozenTrial]:
    """Return the try that counts of each trial, by their numbers; what was drawn beyond the last one is left out."""
    counts: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if not trial.user_attrs.get(SURPLUS):
            known = counts.get(number_of(trial))
            if known is None or not _is_final(known):
                counts[number_of(trial)] = trial
    return [counts[number] for number in sorted(counts)]


def _is_final(trial: FrozenTrial) -> bool:
    failed = trial.state == TrialState.FAIL and REASON in trial.user_attrs
    return failed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def is_open(trial: FrozenTrial) -> bool:
    """Whether a try was broken off: it ended, and nothing is known of it."""
    return trial.state == TrialState.FAIL and not _is_final(trial)


def _counts_before(other: FrozenTrial, own: FrozenTrial) -> bool:
    if other.user_attrs.get(SURPLUS):
        return False
    running = other.state == TrialState.RUNNING and other.number < own.number
    return running or _is_final(other)


def _suggested(trial: Trial, sweep: Sweep) -> Setting:
    setting: Setting = {}
    for key, parameter in sweep.parameters.items():
        if isinstance(parameter, CategoricalDistribution):
            setting[key] = trial.suggest_categorical(key, parameter.choices)
        elif isinstance(parameter, IntDistribution):
            low, high = parameter.low, parameter.high
            setting[key] = trial.suggest_int(key, low, high, step=parameter.step, log=parameter.log)
        else:
            assert isinstance(parameter, FloatDistribution)
            low, high = parameter.low, parameter.high  # type: ignore[assignment]
            setting[key] = trial.suggest_float(key, low, high, log=parameter.log)
    return setting
