"""Every preference loss against its formula written out, and its gradient against finite differences."""

import math

import pytest
import torch

from fine_tune import losses
from fine_tune.modules.metrics import PreferenceMetrics, wilson_interval

C, R = torch.tensor([1.0], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "settings", "expected"),
    [
        (losses.sigmoid_loss, {"beta": 0.2}, -math.log(sigmoid(0.3))),
        (
            losses.sigmoid_loss,
            {"beta": 0.2, "label_smoothing": 0.1},
            -0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3)),
        ),
        (
            losses.robust_loss,
            {"beta": 0.2, "label_smoothing": 0.1},
            (-0.9 * math.log(sigmoid(0.3)) + 0.1 * math.log(sigmoid(-0.3))) / 0.8,
        ),
        (losses.hinge_loss, {"beta": 0.2}, 1 - 0.3),
        (losses.hinge_loss, {"beta": 1.0}, 0.0),
        (losses.ipo_loss, {"beta": 0.5}, (1.5 - 1) ** 2),
        (losses.apo_zero_loss, {"beta": 0.2}, 1 - sigmoid(0.2) + sigmoid(-0.1)),
        (losses.apo_down_loss, {"beta": 0.2}, sigmoid(0.2) + 1 - sigmoid(0.3)),
        (losses.simpo_loss, {"beta": 2.0, "margin": 0.5}, -math.log(sigmoid(2.5))),
    ],
)
def test_losses_are_their_formulas(loss: object, settings: dict, expected: float) -> None:
    assert loss(C, R, **settings).tolist() == pytest.approx([expected], abs=1e-12)  # type: ignore[operator]


def test_orpo_adds_the_odds_to_the_nll_of_the_chosen_answer() -> None:
    chosen, rejected = torch.log(torch.tensor([[0.8], [0.2]], dtype=torch.float64))
    odds = (0.8 / 0.2) / (0.2 / 0.8)
    expected = -math.log(0.8) - 0.1 * math.log(sigmoid(math.log(odds)))
    assert losses.orpo_loss(chosen, rejected, beta=0.1).tolist() == pytest.approx([expected])


def test_policy_equal_to_reference_costs_ln_2() -> None:
    zero = torch.zeros(3)
    assert losses.sigmoid_loss(zero, zero, beta=0.1).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "apo_zero", "apo_down", "orpo"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function = getattr(losses, f"{name}_loss")
    at = torch.tensor([-1.2, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, r: function(c, r, beta=0.3), (at, at.detach() - 1.0))


def test_wilson_intervals_of_none_and_of_all_stay_shares() -> None:
    counts = torch.arange(1, 200, dtype=torch.float64)
    assert (wilson_interval(torch.zeros_like(counts), counts)[0] >= 0).all()
    assert (wilson_interval(torch.ones_like(counts), counts)[1] <= 1).all()


def test_wilson_interval_of_8_of_10() -> None:
    low, high = wilson_interval(torch.tensor(0.8), torch.tensor(10))
    assert (float(low), float(high)) == pytest.approx((0.490, 0.943), abs=1e-3)


def test_preference_metrics_are_means_over_pairs_whatever_the_batches() -> None:
    loss, accuracy = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 1.0])
    results = []
    for cuts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        metrics = PreferenceMetrics()
        for cut in cuts:
            zeros = torch.zeros_like(loss[cut])
            metrics.update(loss[cut], zeros, zeros, accuracy[cut], zeros, zeros, zeros)
        results.append({name: float(value) for name, value in metrics.compute().items()})
    assert results[0] == results[1]
    assert results[0]["loss"] == 3.0
    assert results[0]["rewards_accuracy"] == pytest.approx(2 / 3)


def test_bradley_terry_against_its_formula() -> None:
    plain = losses.bradley_terry_loss(C, R)
    torch.testing.assert_close(plain, torch.tensor([-math.log(sigmoid(1.5))], dtype=torch.float64))
    more = losses.bradley_terry_loss(C, R, margins_B=torch.tensor([0.25]), center=0.1)
    expected = -math.log(sigmoid(1.25)) + 0.1 * 0.5**2
    torch.testing.assert_close(more, torch.tensor([expected], dtype=torch.float64))
    inputs = (C.clone().requires_grad_(), R.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c, r: losses.bradley_terry_loss(c, r, margins_B=0.25, center=0.1), inputs
    )
