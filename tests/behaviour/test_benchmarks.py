"""Every benchmark runs: its gate, its peers, ours, its ratios; at a size where the figures say nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plan_peaks
from benchmarks.inputs import llama
from fine_tune.memory import LiveBytes

REPOSITORY = Path(__file__).parents[2]


def run(*args: object) -> str:
    """Run ``python -m benchmarks`` at toy size and return what it says."""
    command = [sys.executable, "-m", "benchmarks", *map(str, args), "--toy", "--threads", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_training_row_measures_both_sides_after_a_gate() -> None:
    told = run("cpu", "C1")
    gate, first = told.index("parity with TRL"), told.index("pair 0")
    assert gate < first
    assert "parity with Trainer" in told
    assert "tokens/s, ours 32-true / TRL defaults: median" in told
    assert "peak memory, ours 32-true / " in told


@pytest.mark.slow
@pytest.mark.parametrize("row", ["C2", "C3", "C4", "C5", "C7", "C8", "growth"])
def test_other_rows_on_a_cpu(row: str) -> None:
    told = run("cpu", row)
    assert "rows prepared" in told if row == "growth" else "1 pairs" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("G1", ["must: at least 45,000: missed"]),
        (
            "G2",
            [
                "100 tokens per micro-batch, QLoRA / LoRA: must: at least 0.92: ",
                "must: at most 2.6 GB: reached; ",
                "the published 5.67 GB, must: at most 0.46x: reached",
            ],
        ),
        ("G3", ["must: at least 350,000: missed"]),
        ("G4", ["must: at least 130,000: missed"]),
        ("G4-1.5B", ["must: at least 43,000: missed"]),
        ("G5", ["once / twice must: at most 2: reached"]),
    ],
)
def test_the_gpus_rows_run_on_a_cpu_at_toy_size(row: str, wanted: list[str]) -> None:
    told = run("gpu", row)
    assert "parity with T" in told
    assert [line for line in wanted if line not in told] == [], told


@pytest.mark.slow
def test_a_mixture_is_measured_beside_a_dense_model() -> None:
    command = [sys.executable, "-m", "benchmarks.mixture", "--toy", "--threads", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    active = re.search(r"active parameters, mixture / dense: median (\S+)", ended.stdout)
    assert active is not None and float(active[1]) < 1.01  # the routers are all there is more
    assert "bits per byte, mixture / dense: median" in ended.stdout


def test_an_unknown_row_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "cpu", "G1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 2
    assert "no row G1: cpu has C1" in ended.stderr


class Counted(LiveBytes):
    """A device that holds the tensors made while it is entered."""

    can_run_out = False

    def total(self) -> int:
        return 2**34

    def used(self) -> int:
        return self.now.total()

    reserved = allocated = used

    def peak(self) -> int:
        return self.at_peak.total()

    def reset_peak(self) -> None:
        self.start_peak()

    def clear_cache(self) -> None: ...


@pytest.mark.slow
def test_a_plan_is_held_against_the_peak_of_real_runs() -> None:
    toy = {"llama": {**llama(2, 64, 4096), "num_attention_heads": 4}}
    with Counted([], lambda _: "all") as device:
        found = list(plan_peaks.peaks(toy, (64,), device))
    assert len(found) == len(plan_peaks.settings(toy, (64,))) >= 4
    assert [peak for peak in found if abs(peak.off) > plan_peaks.NEAR] == []
    assert plan_peaks.table(found).count("\n| llama |") == len(found)
    assert len(plan_peaks.settings(plan_peaks.MODELS, plan_peaks.LENGTHS)) >= 16
