"""What the tests of DPO and reward models share: pairs, and reading a run's losses and weights."""

from pathlib import Path

import torch
from harness import Outcome, write_rows
from safetensors.torch import load_file

LORA = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj", "v_proj"]']


def write_pairs(file: Path) -> Path:
    """Fifty pairs; several share a prompt."""
    rows = [
        {
            "prompt": f"Berapa {i // 2} + {i % 5}?" + " Jawab." * (i % 3),
            "chosen": f" {i // 2 + i % 5}",
            "rejected": f" {i // 2 + i % 5 + 1} mungkin" + " ya" * (i % 4),
        }
        for i in range(50)
    ]
    return write_rows(file, rows)


def losses(outcome: Outcome, name: str = "run", version: int = 0) -> list[float]:
    assert outcome.code == 0, outcome.err
    rows = outcome.metrics(name, version)
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


def weights(outcome: Outcome, name: str) -> dict[str, torch.Tensor]:
    folder = outcome.run(name).checkpoint("last")
    return load_file(next(folder.glob("*model.safetensors")))  # type: ignore[union-attr]
