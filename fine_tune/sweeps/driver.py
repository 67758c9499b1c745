"""A worker of a sweep: takes trials of the study, one after the other, until there are as many as asked for."""

import math
import time
from collections.abc import Callable
from contextlib import suppress

from optuna.trial import FrozenTrial, TrialState

from fine_tune.sweeps.ledger import Ledger, Lost, Taken, is_open, number_of
from fine_tune.sweeps.space import Sweep
from fine_tune.sweeps.trial import EndedEarly, Runs, RunStopped, TrialFailed, run_setting

WAIT_SECONDS = 2.0
MOST_TRIES = 3  # of a trial whose runs are killed
RUNS, SECONDS = "runs", "seconds"  # what a trial's record has besides its values


class Worker:
    """Takes trials until all of a study are done.

    Args:
        ledger: Hands them out.
        sweep: What is searched.
        runs: Where the runs lie, and how they are started.
        say: Told what happens, a line each.
        show: Told the trials whenever one may have changed.
    """

    def __init__(
        self,
        ledger: Ledger,
        sweep: Sweep,
        runs: Runs,
        say: Callable[[str], None],
        show: Callable[[list[FrozenTrial]], None],
    ) -> None:
        self.ledger, self.sweep, self.runs, self.say, self.show = ledger, sweep, runs, say, show

    def work(self) -> None:
        """Take trials; wait for those of other workers, whose death puts theirs back into the queue."""
        while True:
            trials = self.ledger.trials()
            self.show(trials)
            done = [t for t in trials if t.state.is_finished() and not is_open(t)]
            if len(done) >= self.ledger.num_trials:
                return
            taken = self.ledger.take()
            if taken is None:
                time.sleep(WAIT_SECONDS)
                continue
            self.show(self.ledger.trials())
            with self.ledger.alive(taken), suppress(Lost):
                self._try(taken)

    def _try(self, taken: Taken) -> None:
        start, metrics = time.monotonic(), list(self.sweep.metrics)

        def seconds() -> float:
            return time.monotonic() - start

        try:
            measured = run_setting(
                self.runs, taken.number, taken.setting, metrics, self._seen_by(taken)
            )
        except EndedEarly:
            self.ledger.end(taken, TrialState.PRUNED, seconds=seconds())
        except TrialFailed as failed:
            self.ledger.end(taken, TrialState.FAIL, seconds=seconds(), reason=str(failed))
        except RunStopped as stopped:
            reason = {} if taken.num_tries < MOST_TRIES else {"reason": f"{stopped}, each time"}
            self.say(f"WARNING: trial {taken.number}: {stopped}")
            self.ledger.end(taken, TrialState.FAIL, **reason)  # without one it is tried again
        except Lost:
            self.say(f"WARNING: trial {taken.number} was given to another worker meanwhile")
        except BaseException:  # this worker is stopped; the trial is for whoever comes next
            self.ledger.let_go(taken)
            raise
        else:
            values = measured.means(metrics)
            notes = {RUNS: measured.folders, "of_runs": measured.values, SECONDS: seconds()}
            self.ledger.end(taken, TrialState.COMPLETE, values, **notes)

    def _seen_by(self, taken: Taken) -> Callable[[int, float], bool]:
        several, asked = len(self.sweep.metrics) > 1, self.sweep.pruner != "none"

        def seen(step: int, value: float) -> bool:
            if several or not math.isfinite(value):
                return False
            return self.ledger.report(taken, step, value) and asked

        return seen


def best_first(trials: list[FrozenTrial], metrics: dict[str, str]) -> list[FrozenTrial]:
    """Return the finished trials, the best first; of several metrics those that nothing beats in all come first."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    signs = [1.0 if direction == "minimize" else -1.0 for direction in metrics.values()]

    def costs(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def place(trial: FrozenTrial) -> tuple[bool, list[float], int]:
        mine = costs(trial)
        others = [costs(other) for other in done]
        beaten = any(
            o != mine and all(a <= b for a, b in zip(o, mine, strict=True)) for o in others
        )
        return beaten, mine, number_of(trial)

    return sorted(done, key=place)
