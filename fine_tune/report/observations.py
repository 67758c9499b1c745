"""What a run's numbers say, one thing at a time: pure functions from curves to findings, each with its numbers.

None of them is a verdict; ``analysis`` has that.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fine_tune.report.noise import FEWEST, OF_LEVEL, SIGMAS, mean_until, noise, window
from fine_tune.report.record import Curve

Tone = Literal["good", "bad", "note"]
STEADY_GROWTH, STEADY_PEAK = 3.0, 10.0


@dataclass(frozen=True)
class Finding:
    """One sentence: its key in the words, its numbers, and how it reads."""

    key: str
    tone: Tone = "note"
    numbers: dict[str, float] = field(default_factory=dict)


def training_trend(train: Curve) -> Finding | None:
    """Compare the first window of training losses with the last one."""
    if not len(train):
        return None
    if len(train) < FEWEST:
        numbers = {"last": float(train.values[-1]), "step": int(train.steps[-1])}
        return Finding("train_few", "note", {**numbers, "count": len(train)})
    width = window(train)
    first, last = float(train.values[:width].mean()), float(train.values[-width:].mean())
    numbers = {"first": first, "last": last, "until": int(train.steps[width - 1])}
    numbers["since"] = int(train.steps[-width])
    limit = max(SIGMAS * noise(train.values) * math.sqrt(2 / width), OF_LEVEL * abs(first))
    if abs(last - first) <= limit:
        return Finding("train_flat", "bad", numbers)
    return (
        Finding("train_fell", "good", numbers)
        if last < first
        else Finding("train_rose", "bad", numbers)
    )


def gap(train: Curve, validation: Curve) -> Finding | None:
    """Return training minus validation loss at the last evaluation."""
    if not len(validation):
        return None
    step = int(validation.steps[-1])
    loss = mean_until(train, step)
    if loss is None:
        return None
    measured = float(validation.values[-1])
    return Finding(
        "gap_at_end", "note", {"step": step, "train": loss, "val": measured, "gap": loss - measured}
    )


def gradients(norms: Curve, clip: float | None) -> Finding | None:
    """Say whether gradients stayed of one size: their median late against early, their largest against the median."""
    finite = norms.finite()
    if len(finite) < FEWEST:
        return None
    values = finite.values
    third = len(values) // 3
    early, late = float(np.median(values[:third])), float(np.median(values[-third:]))
    median, most = float(np.median(values)), float(values.max())
    numbers: dict[str, float] = {"median": median, "max": most, "early": early, "late": late}
    numbers |= {"step": int(finite.steps[values.argmax()])}
    key, tone = "grad_steady", "good"
    if early > 0 and late > STEADY_GROWTH * early:
        key, tone = "grad_grew", "bad"
    elif most > STEADY_PEAK * max(early, late):
        key, tone = "grad_peaks", "note"
    if clip:
        numbers |= {"clip": clip, "clipped": float((values > clip).mean())}
        key += "_clipped"
    return Finding(key, tone, numbers)  # type: ignore[arg-type]


def preference(accuracy: Curve, low: Curve, high: Curve) -> Finding | None:
    """Say how often the chosen answer of a validation pair got the higher reward, and whether that beats chance."""
    if not len(accuracy) or len(accuracy) != len(low) or len(low) != len(high):
        return None
    numbers: dict[str, float] = {
        "step": int(accuracy.steps[-1]),
        "share": float(accuracy.values[-1]),
    }
    numbers |= {"low": float(low.values[-1]), "high": float(high.values[-1])}
    beats_chance = numbers["low"] > 0.5
    return Finding(
        "prefers" if beats_chance else "prefers_not", "good" if beats_chance else "note", numbers
    )


def numerics(non_finite_steps: tuple[int, ...], num_spikes: int) -> Finding | None:
    """Count loss spikes and steps that were no finite numbers."""
    if non_finite_steps:
        first = non_finite_steps[0]
        return Finding("fallbacks", "bad", {"count": len(non_finite_steps), "step": first})
    if num_spikes:
        return Finding("spikes", "note", {"count": num_spikes})
    return None
