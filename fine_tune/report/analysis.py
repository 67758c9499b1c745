"""How a run ended, from its curves: pure functions to one verdict, with the numbers that show it.

Every comparison is of means over windows and is held against noise, taken from the differences of neighbouring values,
which a slow trend leaves alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fine_tune.report.noise import (
    FEWEST,
    OF_LEVEL,
    SIGMAS,
    has_late_noise,
    late_noise,
    luck,
    mean_until,
    noise,
    training_noise,
    window,
)
from fine_tune.report.observations import (
    Finding,
    gap,
    gradients,
    numerics,
    preference,
    training_trend,
)
from fine_tune.report.record import Curve

Verdict = Literal["diverged", "overfitted", "worsened", "improving", "converged", "flat", "unclear"]
LATE = 0.8  # from here on a run is late
OF_FALL = 0.02  # smaller changes of a loss are none: of all it fell
OF_LEFT = 0.05  # but this share of what is left is a change, unless that is next to nothing:
NEXT_TO_NOTHING = 0.005  # of all it fell
OF_LEVEL_UNKNOWN = 0.06  # of its value, where few evaluations leave its noise unknown,
FEWEST_RISES, FEWEST_FALLS = 4, 3  # unless it rises since its best, or falls at last, so often
OF_FALL_RISEN = 0.2  # of all that training won and lost again: it diverged
OF_LEVEL_RISEN = 0.2  # of the first loss, by which all of the last ones lie above it


@dataclass(frozen=True)
class Evidence:
    """The numbers of a run.

    Args:
        train: Training loss.
        validation: Validation loss.
        grad_norm: Norm of the gradient before clipping.
        num_spikes: Recorded loss spikes.
        non_finite_steps: Steps whose loss or gradient was infinite or no number.
        accuracy: Of the rewards of validation pairs, with both ends of its interval.
        stopped_step: The step whose loss or gradient was no finite number in the safest precision either.
        clip: Norm to which gradients are clipped, if they are.
    """

    train: Curve
    validation: Curve
    grad_norm: Curve
    num_spikes: int = 0
    non_finite_steps: tuple[int, ...] = ()
    accuracy: tuple[Curve, Curve, Curve] | None = None
    stopped_step: int | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Analysis:
    """The verdict, the finding behind it, and the others."""

    verdict: Verdict
    main: Finding
    others: list[Finding]


def analyse(evidence: Evidence) -> Analysis:
    """Say whether a run converged, overfitted, diverged, still improved, or learned nothing; and what else shows."""
    others = [
        finding
        for finding in (
            training_trend(evidence.train.finite()),
            gap(evidence.train.finite(), evidence.validation.finite()),
            gradients(evidence.grad_norm, evidence.clip),
            preference(*evidence.accuracy) if evidence.accuracy is not None else None,
            numerics(evidence.non_finite_steps, evidence.num_spikes),
        )
        if finding is not None
    ]
    train, validation = evidence.train.finite(), evidence.validation.finite()
    if len(evidence.validation) > len(validation) or len(evidence.train) > len(train):
        broken = (
            evidence.validation if len(evidence.validation) > len(validation) else evidence.train
        )
        first = int(broken.steps[~np.isfinite(broken.values)][0])
        return Analysis("diverged", Finding("not_finite", "bad", {"step": first}), others)
    if evidence.stopped_step is not None:
        broke = Finding("broke", "bad", {"step": evidence.stopped_step})
        return Analysis("diverged", broke, others)
    risen = divergence(train)
    if risen is not None:
        return Analysis("diverged", risen, others)
    worse = overfitting(train, validation)
    if worse is not None:
        return Analysis("overfitted" if worse.key == "overfitted" else "worsened", worse, others)
    stands, main = improvement(train, validation)
    nothing = unlearned(train, validation) if stands == "converged" else None
    if nothing is not None and "prefers" not in [finding.key for finding in others]:
        return Analysis("flat", nothing, others)
    return Analysis(stands, main, others)


def divergence(train: Curve) -> Finding | None:
    """Find a training loss that rises, beyond noise, above the lowest it had been on average."""
    if len(train) < FEWEST:
        return None
    width = window(train)
    first, end = float(train.values[0]), train.values[-max(3, width) :]
    if end.min() > first + OF_LEVEL_RISEN * abs(first):  # all of them: no noise does that
        numbers = {"best": first, "step": int(train.steps[0]), "last": float(end.mean())}
        return Finding("diverged", "bad", numbers)
    blocks = np.array_split(np.arange(len(train)), max(3, len(train) // width))
    means = np.array([train.values[block].mean() for block in blocks])
    best = int(means.argmin())
    rise, fall = float(means[-1] - means[best]), float(means[0] - means[best])
    limit = max(
        (SIGMAS + luck(len(blocks))) * training_noise(train) / math.sqrt(width),
        OF_FALL_RISEN * fall,
        5 * OF_LEVEL * abs(float(means[best])),
    )
    if rise <= limit:
        return None
    numbers = {"best": float(means[best]), "step": int(train.steps[blocks[best][-1]])}
    return Finding("diverged", "bad", {**numbers, "last": float(means[-1])})


def overfitting(train: Curve, validation: Curve) -> Finding | None:
    """Find a validation loss that rises since its best step, beyond noise: overfitting, where training still falls."""
    if len(validation) < 2:
        return None
    best = int(validation.values.argmin())
    low, last = float(validation.values[best]), float(validation.values[-1])
    numbers: dict[str, float] = {"best": low, "last": last}
    numbers |= {"step": int(validation.steps[best]), "end": int(validation.steps[-1])}
    limit = max(
        (SIGMAS + luck(len(validation))) * late_noise(validation),
        _of_level(validation) * abs(low),
        _least(_fall(train, low), low, low),
    )
    since = np.diff(validation.values[np.flatnonzero(validation.values == low)[-1] :])
    if not has_late_noise(validation) and len(since) >= FEWEST_RISES and (since > 0).all():
        limit = OF_LEVEL * abs(low)
    then, now = (mean_until(train, int(validation.steps[i])) for i in (best, -1))
    if last - low <= limit or then is None or now is None:
        return None
    numbers |= {"rise": last - low, "limit": limit, "then": then, "now": now}
    # the noise of a curve that still falls steeply has its fall in it
    least = min(
        SIGMAS * training_noise(train) * math.sqrt(2 / window(train)), OF_LEVEL_UNKNOWN * abs(then)
    )
    falls = then - now > least
    return Finding("overfitted" if falls else "worsened", "bad", numbers)


def improvement(train: Curve, validation: Curve) -> tuple[Verdict, Finding]:
    """Say whether the last fifth of the steps still took off more than noise, by validation where it can tell."""
    curve, which = validation, "validation"
    late = validation.steps <= LATE * validation.steps[-1] if len(validation) else np.zeros(0, bool)
    if not late.any():
        curve, which = train, "train"
    if which == "train" and len(train) < FEWEST:
        return "unclear", Finding(
            "unclear", "note", {"count": len(train), "evaluations": len(validation)}
        )
    if which == "validation":
        index = int(np.flatnonzero(late)[-1])
        start, before, now = (
            int(curve.steps[index]),
            float(curve.values[index]),
            float(curve.values[-1]),
        )
        error = late_noise(curve) * math.sqrt(2)
    else:
        width = max(1, round(len(curve) * (1 - LATE)))
        start = int(curve.steps[-width])
        before = float(curve.values[-2 * width : -width].mean())
        now, error = float(curve.values[-width:].mean()), noise(curve.values) * math.sqrt(2 / width)
    numbers: dict[str, float] = {"before": before, "last": now, "step": start}
    numbers |= {"end": int(curve.steps[-1]), "change": before - now}
    numbers["fall"] = _fall(train, now)
    falls = np.diff(curve.values)[-FEWEST_FALLS:]
    steadily = len(falls) == FEWEST_FALLS and bool((falls < 0).all())
    of_level = OF_LEVEL if which == "train" or steadily else _of_level(curve)
    limit = max(SIGMAS * error, of_level * abs(now), _least(numbers["fall"], before, now))
    if before - now > limit:
        return "improving", Finding(f"improving_{which}", "note", numbers)
    best = int(curve.values.argmin())
    rise = now - float(curve.values[best])
    if which == "validation" and rise > OF_LEVEL * abs(now) and rise > SIGMAS * error:
        risen: dict[str, float] = {
            "best": float(curve.values[best]),
            "step": int(curve.steps[best]),
        }
        risen |= {"rise": rise, "last": now, "end": int(curve.steps[-1]), "count": len(curve)}
        return "unclear", Finding("rose_unsure", "note", risen)
    return "converged", Finding(f"converged_{which}", "good", {**numbers, "limit": limit})


def unlearned(train: Curve, validation: Curve) -> Finding | None:
    """Find that nothing was learned: training loss ends where it began, and validation never fell, beyond noise."""
    trend = training_trend(train)
    if trend is None or trend.key != "train_flat":
        return None
    if not len(validation):
        return Finding("flat_train", "bad", trend.numbers)
    first, best = float(validation.values[0]), float(validation.values.min())
    error = (SIGMAS + luck(len(validation))) * late_noise(validation)
    if first - best > max(error, OF_LEVEL * abs(first)):
        return None
    numbers = {"val_first": first, "val_step": int(validation.steps[0]), "val_best": best}
    return Finding("flat_validation", "bad", {**trend.numbers, **numbers})


def _of_level(validation: Curve) -> float:
    """Return the least change that counts, as a share of the loss: more where its noise is not known."""
    return OF_LEVEL if has_late_noise(validation) else OF_LEVEL_UNKNOWN


def _least(fall: float, loss: float, left: float) -> float:
    """Return the least change of a loss that counts beside all it fell; less while there is a loss left to lose."""
    if abs(left) <= NEXT_TO_NOTHING * fall:
        return OF_FALL * fall
    return min(OF_FALL * fall, OF_LEFT * abs(loss))


def _fall(train: Curve, low: float) -> float:
    """Return how far a loss came down from where training began."""
    return max(0.0, float(train.values[: window(train)].mean()) - low) if len(train) else 0.0
