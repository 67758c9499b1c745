"""What tests share: running a command line in this process, and writing rows."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_models import TOKENIZER

from fine_tune.runs.run_folder import RunFolder

__all__ = ["REPOSITORY", "TOKENIZER", "CommandLine", "Outcome", "write_rows"]

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
