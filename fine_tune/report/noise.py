"""How much a curve moves by chance: windows, the noise around a trend, the luck of the best of many."""

import math

import numpy as np

from fine_tune.report.record import Curve

FEWEST = 6  # logged losses, below which nothing is said of a trend
WINDOW = 0.1  # of the logged steps
SIGMAS = 3.0  # a change of fewer may be chance
OF_LEVEL = 0.01  # a smaller change of a value is none, as a share of it


def noise(values: np.ndarray) -> float:
    """Estimate the standard deviation of a series around its trend, from the median of neighbours' differences.

    ``1.4826 * MAD(differences) / sqrt(2)``: of 1, 2, 1, 2, 1 the differences are 1, -1, 1, -1, their median is 0 and
    their MAD 1, so the noise is 1.05; of a straight line it is 0.
    """
    if len(values) < 3:
        return 0.0
    differences = np.diff(values)
    spread = np.median(np.abs(differences - np.median(differences)))
    return float(1.4826 * spread / math.sqrt(2))


def has_late_noise(curve: Curve) -> bool:
    """Whether the second half has values enough for its noise; few values of a steep fall say nothing of it."""
    return len(curve) - len(curve) // 2 >= FEWEST


def late_noise(curve: Curve) -> float:
    """Estimate the noise of the second half; 0 where it is not known."""
    return noise(curve.values[len(curve) // 2 :]) if has_late_noise(curve) else 0.0


def training_noise(train: Curve) -> float:
    """Estimate the noise of training losses: late in the run, or where they are few, in all of it."""
    return late_noise(train) or noise(train.values)


def luck(count: int) -> float:
    """Return by how many standard deviations the least of so many draws lies below their mean, at most about."""
    return math.sqrt(2 * math.log(count))


def window(curve: Curve) -> int:
    """Return how many logged values are averaged into one mean."""
    return max(1, round(len(curve) * WINDOW))


def mean_until(curve: Curve, step: int) -> float | None:
    """Return the mean of the last window of values up to a step."""
    values = curve.values[curve.steps <= step]
    return float(values[-window(curve) :].mean()) if len(values) else None
