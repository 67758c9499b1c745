"""A sweep in the terminal: a line as each trial ends, and at the end the ranked table."""

from datetime import timedelta
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fine_tune.printable import printable
from fine_tune.sweeps.compare import Difference
from fine_tune.sweeps.driver import SECONDS, best_first
from fine_tune.sweeps.ledger import REASON, is_open, number_of
from fine_tune.sweeps.space import Sweep

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
COLOURS = {"failed": "red", "running": "cyan", "ended early": "yellow"}


class LiveTable:
    """The trials as they are, drawn anew as they change; without a terminal, a line for each that ended.

    Args:
        console: Where to.
        sweep: What is searched.
        num_trials: There will be.
    """

    def __init__(self, console: Console, sweep: Sweep, num_trials: int) -> None:
        self.console, self.sweep, self.num_trials = console, sweep, num_trials
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._told: set[int] = set()

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(printable(line))

    def show(self, trials: list[FrozenTrial]) -> None:
        """Draw the trials, or tell those that ended since."""
        if self._live is not None:
            self._live.update(
                trials_table(trials, self.sweep, self._time_left(trials)), refresh=True
            )
            return
        for trial in trials:
            over = trial.state.is_finished() and not is_open(trial)
            if over and trial.number not in self._told:
                self._told.add(trial.number)
                self.say(self._line(trial, trials))

    def _line(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> str:
        told = " ".join(f"{short(key)}={_shown(v)}" for key, v in trial.params.items())
        until = [t for t in trials if t.number <= trial.number]
        best = best_first(until, self.sweep.metrics)[:1]
        ended = sum(t.state.is_finished() for t in until)
        parts = [
            f"{ended}/{self.num_trials}  trial {number_of(trial)}",
            STATES[trial.state],
            told,
        ]
        if trial.state == TrialState.COMPLETE:
            parts += [
                f"{name} {_shown(value)}"
                for name, value in zip(self.sweep.metrics, trial.values, strict=True)
            ]
        if trial.state == TrialState.FAIL:
            parts.append(str(trial.user_attrs.get(REASON, "")))
        if best:
            parts.append(f"best so far: trial {number_of(best[0])}, {_shown(best[0].values[0])}")
        return "  ".join([*parts, self._time_left(trials)]).rstrip()

    def _time_left(self, trials: list[FrozenTrial]) -> str:
        took = [t.user_attrs[SECONDS] for t in trials if SECONDS in t.user_attrs]
        left = self.num_trials - sum(t.state.is_finished() for t in trials)
        workers = max(1, sum(t.state == TrialState.RUNNING for t in trials))
        if not took or not left:
            return ""
        seconds = round(sum(took) / len(took) * left / workers)
        return f"about {timedelta(seconds=seconds)} left"


def trials_table(trials: list[FrozenTrial], sweep: Sweep, under: str = "") -> Table:
    """Return the trials as a table, the best of them marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=under, caption_justify="left")
    heads: list[str] = ["trial", "state", *sweep.parameters, *sweep.metrics, "time", ""]
    for head in heads:
        justify: Any = "right" if head in sweep.metrics or head == "time" else "left"
        table.add_column(printable(short(head)), justify=justify, overflow="fold")
    best = [number_of(t) for t in best_first(trials, sweep.metrics)[:1]]
    for trial in trials:
        state = "waiting" if is_open(trial) else STATES[trial.state]
        values = trial.values or [None] * len(sweep.metrics)
        seconds = trial.user_attrs.get(SECONDS)
        cells: list[str | Text] = [
            str(number_of(trial)),
            Text(state, style=COLOURS.get(state, "")),
            *(_shown(trial.params.get(key)) for key in sweep.parameters),
            *(_shown(value) for value in values),
            "" if seconds is None else str(timedelta(seconds=round(seconds))),
            Text("best" if number_of(trial) in best else str(trial.user_attrs.get(REASON, ""))),
        ]
        table.add_row(*(c if isinstance(c, Text) else Text(printable(c)) for c in cells))
    return table


def told_difference(number: int, found: Difference) -> str:
    """Say how a trial's loss compares with that of the config's own setting."""
    ends = f"{found.low:+.4g} to {found.high:+.4g}, 95 % over seeds and rows"
    told = {"better": "better than", "worse": "worse than", "cannot tell": "cannot be told from"}
    return f"trial {number}: loss {found.value:+.4g} ({ends}): {told[found.verdict]} the config's own setting"


def short(key: str) -> str:
    """Return the end of a setting's key: ``lr`` of ``model.optimizer.lr``."""
    return key.split(".")[-1]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
