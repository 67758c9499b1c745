"""Every benchmark runs: its gate, its peers, ours, its ratios; at a size where the figures say nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(*args: object) -> str:
    """Run ``python -m benchmarks`` at toy size and return what it says."""
    pytest.importorskip("trl")
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
@pytest.mark.parametrize("row", ["G1", "G2", "G3", "G4", "G5"])
def test_the_gpus_rows_run_on_a_cpu_at_toy_size(row: str) -> None:
    assert "parity with T" in run("gpu", row)


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
