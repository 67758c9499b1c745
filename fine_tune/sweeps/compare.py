"""Whether one setting is better than another, or cannot be told from it: over seeds and over rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from fine_tune.runs.row_losses import read_row_losses
from fine_tune.runs.run_folder import RunFolder
from fine_tune.sweeps.driver import RUNS

FEWEST_SEEDS = 3
Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """A setting's loss less the other's.

    Args:
        value: Of the means over the seeds.
        low: End of the 95 % interval.
        high: Its other end.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Of a loss: less is better."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "cannot tell"


def difference(own: list[np.ndarray], other: list[np.ndarray]) -> Difference | None:
    """Compare the losses of two settings on the same rows.

    Both seeds and rows are draws: the variance of the difference is that of each setting's mean over its seeds, plus
    that of the rows' mean difference, each by its degrees of freedom (Welch, 1947; Satterthwaite, 1946). Of a ratio of
    sums, rows count by their deviation from it (Cochran, Sampling Techniques, 1977, section 6.3).

    Args:
        own: ``[R, 3]`` of each seed's run: id, count, summed loss.
        other: The same of the other setting.

    Returns:
        None with fewer than 3 seeds on a side, or where rows are not the same.
    """
    if min(len(own), len(other)) < FEWEST_SEEDS or not _same_rows([*own, *other]):
        return None
    means = [[run[:, 2].sum() / run[:, 1].sum() for run in side] for side in (own, other)]
    value = float(np.mean(means[0]) - np.mean(means[1]))
    by_row = _by_row(own) - _by_row(other)
    variances = [float(np.var(side, ddof=1)) / len(side) for side in means]
    variances.append(float(np.var(by_row, ddof=1)) / len(by_row) if len(by_row) > 1 else 0.0)
    freedoms = [len(own) - 1, len(other) - 1, max(1, len(by_row) - 1)]
    total = sum(variances)
    if total == 0:
        return Difference(value, value, value)
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(total))
    return Difference(value, value - reach, value + reach)


def against_shipped(
    trials: list[FrozenTrial], shipped: list[dict[str, Any]]
) -> dict[int, Difference]:
    """Compare finished trials with the one that has the config's own setting, by their numbers.

    Args:
        trials: Of a study.
        shipped: The config's own setting, if it was tried.
    """
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    own = next((t for t in done if t.params in shipped), None)
    if own is None:
        return {}
    found = {}
    for trial in done:
        if trial.number != own.number:
            compared = difference(_row_losses(trial), _row_losses(own))
            if compared is not None:
                found[trial.number] = compared
    return found


def _row_losses(trial: FrozenTrial) -> list[np.ndarray]:
    read = [read_row_losses(RunFolder(Path(path))) for path in trial.user_attrs.get(RUNS, [])]
    return [losses for losses in read if losses is not None]


def _same_rows(runs: list[np.ndarray]) -> bool:
    first = runs[0][:, :2]
    return len(first) > 0 and all(np.array_equal(first, run[:, :2]) for run in runs)


def _by_row(runs: list[np.ndarray]) -> np.ndarray:
    """Return what each row adds to a setting's loss beyond the mean, as a mean over its seeds."""
    deviations = []
    for run in runs:
        counts, losses = run[:, 1], run[:, 2]
        ratio = losses.sum() / counts.sum()
        deviations.append((losses - ratio * counts) / counts.mean())
    return np.mean(deviations, axis=0)
