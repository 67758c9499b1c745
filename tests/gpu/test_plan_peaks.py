"""What the plan says of a run's memory is what the run takes of a real device."""

import pytest
import torch

from benchmarks import plan_peaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="measures the memory of a CUDA device, and there is none",
    ),
]


def test_the_plans_peak_is_a_gpus() -> None:
    found = plan_peaks.main()  # the table is kept with the benchmarks' results
    assert len(found) >= 10
    assert [peak for peak in found if abs(peak.off) > plan_peaks.NEAR] == []
