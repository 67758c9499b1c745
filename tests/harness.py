"""What tests share: running a command line in this process, and writing rows."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_models import TOKENIZER

from fine_tune.runs.run_folder import RunFolder

__all__ = ["REPOSITORY", "TOKENIZER", "CommandLine", "Outcome", "fit_on_ranks", "write_rows"]

REPOSITORY = Path(__file__).parent.parent


@dataclass
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str
    root: Path

    def run(self, name: str = "run", version: int = 0) -> RunFolder:
        return RunFolder(self.root / "lightning_logs" / name / f"version_{version}")

    def metrics(self, name: str = "run", version: int = 0) -> list[dict[str, str]]:
        with open(self.run(name, version).path / "metrics.csv", newline="") as handle:
            return list(csv.DictReader(handle))


CommandLine = Callable[..., Outcome]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def assert_same_weights(first: Path | None, second: Path | None) -> None:
    """Compare two checkpoints bit for bit."""
    assert first is not None
    assert second is not None
    one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def fit_on_ranks(
    root: Path, strategy: str, devices: int, *args: str, seconds: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run ``fit`` in several processes, in a process of its own that sees the faults of the tests."""
    ranks = ["--trainer.devices", str(devices), "--trainer.strategy", strategy]
    ranks += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)]
    faults = REPOSITORY / "tests" / "faults"
    return subprocess.run(
        [sys.executable, "-m", "fine_tune", "fit", *args, *ranks],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{faults}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
