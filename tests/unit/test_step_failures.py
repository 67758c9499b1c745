"""Which rows are reported when they do not fit, on several ranks."""

import pytest

from fine_tune.modules.gradients import _to_get_smaller


@pytest.mark.parametrize(
    ("failed", "reported"),
    [
        ([(800, 4)], (800, 4)),
        ([(200, 1)], (200, 1)),
        ([(800, 4), (300, 3)], (300, 3)),  # a budget below both
        ([(2000, 1), (300, 3)], (300, 3)),  # the row alone is the next failure, if it is one
        ([(200, 1), (2000, 1)], (2000, 1)),
    ],
)
def test_of_several_ranks_what_can_get_smaller_is_reported(
    failed: list[tuple[int, int]], reported: tuple[int, int]
) -> None:
    assert _to_get_smaller(failed) == reported
