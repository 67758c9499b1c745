"""Better, worse, or cannot tell: by literal arithmetic, and by how often the interval holds the truth."""

import numpy as np
import pytest

from fine_tune.sweeps.compare import difference


def runs(means: list[float], rows: list[float]) -> list[np.ndarray]:
    """Runs of rows of one token each, whose losses are the seed's mean and the row's own part."""
    ids = np.arange(len(rows))
    return [np.stack([ids, np.ones(len(rows)), mean + np.array(rows)], 1) for mean in means]


def test_seeds_alone_by_hand() -> None:
    # rows add the same to both sides, so that only seeds vary: variances 0.01 / 3 each, 4 degrees of freedom
    own, other = runs([1.0, 1.1, 0.9], [0.5, -0.5]), runs([2.0, 2.1, 1.9], [0.5, -0.5])
    found = difference(own, other)
    assert found is not None
    reach = 2.776445 * (0.02 / 3) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((-1, -1 - reach, -1 + reach))
    assert found.verdict == "better"
    back = difference(other, own)
    assert back is not None
    assert back.verdict == "worse"


def test_rows_alone_by_hand() -> None:
    # seeds are all alike; the rows' differences are 1, 2, 3: mean 2, variance 1 / 3, 2 degrees of freedom
    own, other = runs([0.0] * 3, [2.0, 4.0, 6.0]), runs([0.0] * 3, [1.0, 2.0, 3.0])
    found = difference(own, other)
    assert found is not None
    reach = 4.302653 * (1 / 3) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - reach, 2 + reach))
    assert found.verdict == "cannot tell"


def test_too_few_seeds_and_other_rows_are_not_compared() -> None:
    assert difference(runs([1.0, 2.0], [0.0]), runs([1.0, 2.0, 3.0], [0.0])) is None
    assert difference(runs([1.0, 2.0, 3.0], [0.0]), runs([1.0, 2.0, 3.0], [0.0, 1.0])) is None


def test_equal_settings_are_called_different_about_as_seldom_as_promised() -> None:
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        rows = draw.normal(0, 1, 50)
        sides = [
            [
                np.stack([np.arange(50), np.ones(50), 2 + seed + rows + draw.normal(0, 0.3, 50)], 1)
                for seed in draw.normal(0, 0.2, 4)
            ]
            for _ in range(2)
        ]
        found = difference(*sides)
        assert found is not None
        wrong += found.verdict != "cannot tell"
    assert wrong <= 0.07 * 400  # 5 % promised
