"""What the plan says of a run's memory is what the run takes of a real device."""

import pytest

from benchmarks import plan_peaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
]


def test_the_plans_peak_is_a_gpus() -> None:
    found = plan_peaks.main()  # the table is kept with the benchmarks' results
    assert len(found) >= 10
    assert [peak for peak in found if abs(peak.off) > plan_peaks.NEAR] == []
