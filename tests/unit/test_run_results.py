"""What a record's results, openings and times are about."""

from typing import Any

import pytest

from fine_tune.runs.results import own_openings, timed_steps


@pytest.mark.parametrize(
    ("record", "steps"),
    [
        ({"step": 9, "starts": [{"from_step": 0}]}, [(0, 9)]),  # of an older version
        ({"step": 9}, [(0, 9)]),
        ({"step": 9, "starts": [{"from_step": 0, "to_step": 9}]}, [(0, 9)]),
        ({"step": 9, "starts": [{"from_step": 0}, {"from_step": 6, "to_step": 9}]}, [(6, 9)]),
        ({"step": 9, "starts": [{"from_step": 0}, {"from_step": 6}]}, []),
        # begun by an older version, which counted its seconds alone
        (
            {
                "seconds": 9.0,
                "starts": [{"from_step": 0}, {"from_step": 6, "to_step": 9, "seconds": 3}],
            },
            [],
        ),
        ({"step": 9, "starts": [{"from_step": "0", "to_step": None}, {}]}, []),
    ],
)
def test_time_is_known_of_the_steps_of_starts_that_were_not_killed(
    record: dict[str, Any], steps: list[tuple[int, int]]
) -> None:
    assert timed_steps(record) == steps


def test_openings_of_other_rows_are_not_the_runs_own() -> None:
    openings = [{"test_hash": "a"}, {"test_hash": "b"}, {}]
    assert own_openings({"test_hash": "a", "test_openings": openings}) == (2, 1)
    assert own_openings({}) == (0, 0)
