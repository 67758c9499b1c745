"""Evaluation metrics and how sure they are; the energy that GPUs count."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fine_tune.device_energy import energy_meter
from fine_tune.modules.metrics import PreferenceMetrics, TokenMetrics


def measured(nll: list[list[float]], correct: list[list[bool]], at_once: int) -> dict[str, float]:
    metrics = TokenMetrics()
    for start in range(0, len(nll), at_once):
        rows, right = nll[start : start + at_once], correct[start : start + at_once]
        metrics.update(
            torch.tensor([v for row in rows for v in row]),
            torch.tensor([v for row in right for v in row]),
            [len(row) for row in rows],
        )
    return {name: float(value) for name, value in metrics.compute().items()}


def test_a_loss_is_as_sure_as_its_rows_differ() -> None:
    # rows of 2, 1 and 1 tokens: mean 2 over 4 tokens; residuals of the rows -1, 0 and 1:
    # standard error sqrt((1 + 0 + 1) * 3 / 2) / 4
    found = measured([[1.0, 2.0], [2.0], [3.0]], [[True, True], [True], [False]], at_once=3)
    error = 1.96 * (2 * 3 / 2) ** 0.5 / 4
    assert found["loss"] == 2.0
    assert (found["loss_low"], found["loss_high"]) == pytest.approx((2 - error, 2 + error))
    assert found["perplexity_low"] == pytest.approx(np.exp(2 - error), rel=1e-6)
    again = measured([[1.0, 2.0], [2.0], [3.0]], [[True, True], [True], [False]], at_once=1)
    assert again == pytest.approx(found, rel=1e-12)


def test_the_intervals_cover_what_rows_drawn_again_give() -> None:
    draw = np.random.default_rng(0)
    level = draw.gamma(4, 0.5, 400)  # tokens of one row are alike
    rows = [(level[i] + draw.normal(0, 0.1, draw.integers(1, 9))).tolist() for i in range(400)]
    right = [[bool(level[i] < 2.0)] * len(row) for i, row in enumerate(rows)]
    found = measured(rows, right, at_once=50)
    means, shares = [], []
    for _ in range(2000):
        chosen = draw.integers(0, 400, 400)
        means.append(np.mean([v for i in chosen for v in rows[i]]))
        shares.append(np.mean([v for i in chosen for v in right[i]]))
    for name, values in (("loss", means), ("token_accuracy", shares)):
        low, high = np.percentile(values, [2.5, 97.5])
        width = high - low
        assert found[f"{name}_low"] == pytest.approx(low, abs=0.1 * width)
        assert found[f"{name}_high"] == pytest.approx(high, abs=0.1 * width)


def test_all_right_is_not_sure_to_be_always_right() -> None:
    found = measured([[0.1] * 3] * 10, [[True] * 3] * 10, at_once=10)
    assert found["token_accuracy"] == 1.0
    assert found["token_accuracy_low"] == pytest.approx(0.722, abs=1e-3)  # Wilson, 10 of 10


def test_a_single_row_has_no_interval() -> None:
    found = measured([[1.0, 2.0]], [[True, False]], at_once=1)
    assert found["loss"] == 1.5 and np.isnan(found["loss_low"])


def test_means_over_pairs_have_their_standard_errors() -> None:
    metrics = PreferenceMetrics()
    loss, zeros, ones = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3), torch.ones(3)
    metrics.update(loss, zeros, zeros, ones, zeros, zeros, zeros)
    found = {name: float(value) for name, value in metrics.compute().items()}
    error = 1.96 * np.std([1, 2, 6], ddof=1) / 3**0.5
    assert (found["loss_low"], found["loss_high"]) == pytest.approx((3 - error, 3 + error))


def test_energy_is_the_difference_of_nvmls_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = {"GPU-a": [1_000_000, 4_600_000], "GPU-b": [0, 7_200_000]}
    nvml: Any = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: counters[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: handle.pop(0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = lambda device: SimpleNamespace(uuid="ab"[device.index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    meter = energy_meter([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert meter is not None
    assert meter.watt_hours() == pytest.approx(1 + 2)


def test_without_gpu_or_nvml_energy_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter([torch.device("cpu")]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert energy_meter([torch.device("cuda", 0)]) is None
