"""What a report says of a run, from made curves whose truth is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fine_tune.report.analysis import Analysis, Evidence, analyse
from fine_tune.report.charts import Drawing, Line, Mark, draw, smoothed, thinned
from fine_tune.report.findings import analysis_of
from fine_tune.report.intervals import wilson
from fine_tune.report.noise import mean_until, noise
from fine_tune.report.observations import gap, gradients
from fine_tune.report.record import Curve, RunRecord
from fine_tune.report.tables import interval
from fine_tune.report.targets import judge

NONE = Curve(np.array([], dtype=int), np.array([]))


def curve(values: Any, every: int = 1) -> Curve:
    values = np.asarray(values, dtype=float)
    return Curve(every * np.arange(1, len(values) + 1), values)


def noisy(values: Any, spread: float = 0.02) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values + spread * np.random.default_rng(0).standard_normal(len(values))


def verdict(train: Any, validation: Any = (), every: int = 10, **more: Any) -> Analysis:
    return analyse(Evidence(curve(train), curve(validation, every), NONE, **more))


def falling(num: int, rate: float = 0.05, low: float = 1.0) -> np.ndarray:
    return low + 2 * np.exp(-rate * np.arange(num))


def test_overfitting_is_told_with_its_numbers() -> None:
    validation = [2.0, 1.5, 1.2, 1.1, 1.15, 1.25, 1.35, 1.45, 1.55, 1.65]
    found = verdict(noisy(falling(100, 0.03, low=0.2)), validation)
    assert found.verdict == "overfitted"
    told = found.main.numbers
    assert (told["best"], told["step"], told["last"], told["end"]) == (1.1, 40, 1.65, 100)
    assert told["rise"] == pytest.approx(0.55)
    assert told["now"] < told["then"]


def test_a_diverging_run_is_told_with_its_numbers() -> None:
    train = [*falling(60), *np.linspace(1.1, 4.0, 40)]
    found = verdict(noisy(train), [2.0, 1.5, 1.3, 1.2, 1.1, 1.1, 1.6, 2.3, 3.1, 3.9])
    assert found.verdict == "diverged"
    assert found.main.numbers["best"] == pytest.approx(1.1, abs=0.1)
    assert found.main.numbers["last"] > 3.5
    assert 50 <= found.main.numbers["step"] <= 65


def test_a_loss_that_is_no_number_is_divergence_whatever_came_before() -> None:
    found = verdict(falling(100), [2.0, 1.5, math.nan, 1.2])
    assert (found.verdict, found.main.key) == ("diverged", "not_finite")
    assert found.main.numbers["step"] == 30


def test_a_loss_far_above_its_start_is_divergence_however_wild() -> None:
    train = [7.2, 571, 529, 330, 201, 89, 187, 279, 132, 185, 300, 120]
    found = verdict(train, [396, 498, 218, 78, 178, 110])
    assert (found.verdict, found.main.numbers["best"]) == ("diverged", 7.2)


def test_a_run_stopped_at_a_step_without_finite_numbers_diverged() -> None:
    found = verdict([7.2, 9.0, 30.0], stopped_step=4, non_finite_steps=(4,))
    assert (found.verdict, found.main.numbers) == ("diverged", {"step": 4})


@pytest.mark.parametrize(("last", "diverged"), [(49, True), (100, False)])
def test_a_run_that_went_on_after_a_step_without_finite_numbers_did_not_end_there(
    last: int, diverged: bool
) -> None:
    losses = enumerate(noisy(falling(last, 0.1)), start=1)
    broke = {"step": 50, "kind": "fallback", "to": None, "event": "not finite"}
    record = {"status": "finished", "step": last, "num_steps": 100, "events": [broke]}
    metrics = [{"step": step, "train/loss": float(loss)} for step, loss in losses]
    found = analysis_of(RunRecord(Path("run"), record=record, metrics=metrics))
    assert (found.verdict == "diverged") == diverged
    assert "fallbacks" in [finding.key for finding in found.others]


def test_still_improving_is_told_with_its_numbers() -> None:
    train = np.linspace(3.0, 1.0, 100)
    found = verdict(noisy(train), np.linspace(3.0, 1.2, 10))
    assert found.verdict == "improving"
    told = found.main.numbers
    assert (told["step"], told["end"]) == (80, 100)
    assert told["change"] == pytest.approx(0.4)
    assert (told["before"], told["last"]) == (pytest.approx(1.6), pytest.approx(1.2))


def test_without_evaluations_training_loss_decides() -> None:
    assert verdict(noisy(np.linspace(3.0, 1.0, 100))).main.key == "improving_train"
    assert verdict(noisy(falling(100, 0.1))).main.key == "converged_train"


def test_a_flat_end_is_convergence() -> None:
    found = verdict(noisy(falling(100, 0.1)), falling(10, 1.0, low=1.1))
    assert (found.verdict, found.main.key) == ("converged", "converged_validation")


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_learned_nothing_is_not_called_converged(seed: int) -> None:
    draw = np.random.default_rng(seed)
    train = 2.5 + 0.1 * draw.standard_normal(200)
    validation = 2.5 + 0.005 * draw.standard_normal(20)
    found = verdict(train, validation)
    assert (found.verdict, found.main.key, found.main.tone) == ("flat", "flat_validation", "bad")
    told = found.main.numbers
    assert (told["val_first"], told["val_step"]) == (validation[0], 10)
    assert told["val_best"] == validation.min()
    alone = verdict(train)
    assert (alone.verdict, alone.main.key) == ("flat", "flat_train")


def test_a_flat_training_loss_is_no_failure_where_validation_or_the_preferences_moved() -> None:
    train = np.full(100, 2.5) + noisy(np.zeros(100), 0.1)
    assert verdict(train, [2.5, *np.full(9, 2.4)]).verdict == "converged"
    assert verdict(train, np.full(10, 2.5)).verdict == "flat"
    accuracy, high = curve([0.5, 0.62]), curve([0.6, 0.7])
    better = verdict(train, np.full(10, 2.5), accuracy=(accuracy, curve([0.4, 0.53]), high))
    assert better.verdict == "converged"
    chance = verdict(train, np.full(10, 2.5), accuracy=(accuracy, curve([0.4, 0.49]), high))
    assert chance.verdict == "flat"


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_neither_overfitting_nor_divergence_nor_improvement(seed: int) -> None:
    draw = np.random.default_rng(seed)
    train = falling(200, 0.1) + 0.1 * draw.standard_normal(200)
    validation = falling(20, 1.0, low=1.1) + 0.005 * draw.standard_normal(20)
    assert verdict(train, validation).verdict == "converged"


def test_what_is_left_of_a_loss_counts_beside_all_it_fell() -> None:
    train = 0.15 + 4.2 * np.exp(-0.12 * np.arange(39))  # from random weights
    found = verdict(train, [0.3376, 0.2278, 0.1615, 0.1511])
    assert (found.verdict, found.main.key) == ("improving", "improving_validation")
    there = verdict(0.004 + 4.2 * np.exp(-0.3 * np.arange(98)), [0.3, 0.1, 0.017, 0.006], every=24)
    assert there.verdict == "converged"  # next to nothing is left


SHORT = np.linspace(1.6, 0.7, 30)  # training loss of three epochs


@pytest.mark.parametrize(
    ("train", "validation", "stands"),
    [
        ([6.0, 3.5, 2.0, 1.2, 0.8, 0.5441, 0.42, 0.3658], [3.0, 2.1, 2.25], "overfitted"),
        (SHORT, [1.45, 1.40, 1.46], "unclear"),  # one rise of 4 %: three evaluations cannot tell
        (SHORT, [1.45, 1.40, 1.50], "overfitted"),
        (SHORT, [1.30, 1.32, 1.33, 1.34, 1.35], "overfitted"),  # rising each time
        (SHORT, [1.40, 1.30, 1.25, 1.25, 1.255, 1.26, 1.27, 1.28, 1.29, 1.30], "overfitted"),
        (SHORT, [1.45, 1.40, 1.405], "converged"),
        (noisy(np.full(30, 0.0049), 1e-5), [0.004909, 0.0049, 0.004962], "unclear"),
        (noisy(np.full(30, 0.0049), 1e-5), [0.004909, 0.0049, 0.0058], "worsened"),
        (np.linspace(0.20, 0.16, 40), [0.60, 0.55, 0.53, 0.57], "overfitted"),  # DPO
    ],
)
def test_few_evaluations_are_told_as_far_as_they_go(
    train: Any, validation: list[float], stands: str
) -> None:
    assert verdict(train, validation, every=max(1, len(train) // len(validation))).verdict == stands


@pytest.mark.parametrize("count", [3, 5, 10])
def test_a_flat_validation_with_noise_is_seldom_called_anything_else(count: int) -> None:
    draw = np.random.default_rng(count)
    found = []
    for _ in range(300):
        validation = 1.4 * (1 + 0.02 * draw.standard_normal(count))
        found.append(verdict(SHORT, validation, every=30 // count).verdict)
    wrong = sum(v in ("overfitted", "worsened", "improving") for v in found)
    assert wrong <= 0.25 * len(found)


def test_few_numbers_give_no_verdict() -> None:
    assert verdict([3.0, 2.0, 1.0]).verdict == "unclear"
    assert verdict([]).verdict == "unclear"
    assert verdict([3.0, 2.0], [2.0]).main.numbers == {"count": 2, "evaluations": 1}


def test_validation_that_rises_while_training_does_not_fall_is_no_overfitting() -> None:
    train = [*falling(60), *np.full(40, 1.25)]
    found = verdict(train, [2.0, 1.5, 1.2, 1.1, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4])
    assert found.verdict == "worsened"


def test_gradients_are_steady_grow_or_peak() -> None:
    steady = gradients(curve([1.0, 1.1, 0.9, 1.0, 1.2, 0.8]), clip=1.0)
    assert steady is not None and steady.key == "grad_steady_clipped"
    assert steady.numbers["clipped"] == pytest.approx(2 / 6)
    assert steady.numbers["max"] == 1.2 and steady.numbers["step"] == 5
    grown = gradients(curve([1.0, 1.0, 2.0, 3.0, 4.0, 4.0]), clip=None)
    assert grown is not None and grown.key == "grad_grew"
    assert (grown.numbers["early"], grown.numbers["late"]) == (1.0, 4.0)
    peaks = gradients(curve([1.0, 1.0, 1.0, 30.0, 1.0, 1.0]), clip=None)
    assert peaks is not None and (peaks.key, peaks.numbers["step"]) == ("grad_peaks", 4)


def test_the_gap_is_training_minus_validation_at_the_last_evaluation() -> None:
    found = gap(curve(np.full(20, 1.0)), curve([2.0, 1.5], every=10))
    assert found is not None
    assert found.numbers == {"step": 20, "train": 1.0, "val": 1.5, "gap": -0.5}


def test_preferences_beat_chance_only_where_their_interval_does() -> None:
    accuracy, low, high = curve([0.5, 0.62]), curve([0.4, 0.53]), curve([0.6, 0.7])
    better = verdict([], accuracy=(accuracy, low, high)).others[0]
    assert better.key == "prefers"
    assert better.numbers == {"step": 2, "share": 0.62, "low": 0.53, "high": 0.7}
    unclear = verdict([], accuracy=(accuracy, curve([0.4, 0.49]), high)).others[0]
    assert unclear.key == "prefers_not"


def test_fallbacks_and_spikes_are_counted() -> None:
    found = verdict(falling(100, 0.1), non_finite_steps=(7, 9), num_spikes=3)
    assert {f.key: f.numbers for f in found.others}["fallbacks"] == {"count": 2, "step": 7}
    found = verdict(falling(100, 0.1), num_spikes=3)
    assert {f.key: f.numbers for f in found.others}["spikes"] == {"count": 3}


def test_noise_is_that_of_neighbours_not_of_a_trend() -> None:
    assert noise(np.array([1.0, 2.0, 1.0, 2.0, 1.0])) == pytest.approx(1.4826 / math.sqrt(2))
    assert noise(np.linspace(0, 5, 9)) == pytest.approx(0, abs=1e-12)


def test_means_are_of_the_last_tenth_up_to_a_step() -> None:
    assert mean_until(curve(range(20)), 20) == 18.5
    assert mean_until(curve(range(20)), 2) == 0.5
    assert mean_until(curve(range(20), every=10), 5) is None


def test_thinning_keeps_the_extremes_and_smoothing_the_mean() -> None:
    values = np.zeros(10_000)
    values[[1234, 8765]] = 50.0, -50.0
    thin = thinned(curve(values))
    assert len(thin) <= 600
    assert (thin.values.max(), thin.values.min()) == (50.0, -50.0)
    assert thin.steps[thin.values.argmax()] == 1235
    assert thinned(curve([3, 1, 2, 9, 4]), most=1).values.tolist() == [1, 9]
    assert smoothed(curve([0, 3, 6]), 3).values.tolist() == [1.5, 3, 4.5]


def test_marks_of_one_kind_are_few_with_the_first_and_the_last() -> None:
    def drawn(steps: list[int]) -> int:
        lines = [Line("a", curve(np.ones(1000)))]
        return draw(Drawing(lines, "step", [Mark("m", steps, "bad")])).count("var(--bad)")

    assert drawn(list(range(1, 1001))) <= 62
    assert drawn([1, 1000]) < drawn([1, 500, 1000]) < drawn(list(range(1, 60)))


def test_wilson_of_9_in_10() -> None:
    assert wilson(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    for count in range(1, 200):
        assert wilson(0.0, count)[0] >= 0 and wilson(1.0, count)[1] <= 1


def test_the_table_keeps_to_a_hundred_rows_at_whole_logging_intervals() -> None:
    assert interval(num_rows=62, logged=10) == 10
    assert interval(num_rows=101, logged=10) == 20
    assert interval(num_rows=10_000, logged=1) == 100


def test_targets_know_which_way_is_better() -> None:
    results = [{"metrics": {"val/loss": 0.7, "val/rewards_margin": 0.06}}]
    judged = judge(results, {"val/loss": 0.5, "val/rewards_margin": 0.05, "test/loss": 1.0})
    assert [target.is_reached for target in judged] == [False, True, False]
    assert judged[2].measured is None
