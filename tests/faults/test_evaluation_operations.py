"""Memory may run out at any operation of an evaluation: every row is counted once all the same."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import TOKENIZER, CommandLine, Outcome
from preference_runs import write_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from fine_tune.modules.base import StepModule

EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "moe_intermediate_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


class RunsOutAt(TorchDispatchMode):
    """The n-th operation that takes memory of its own runs out of it; those in place take none."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self.left = operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.name.endswith("_"):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return func(*args, **(kwargs or {}))


def run_out_at_every_operation(monkeypatch: pytest.MonkeyPatch, cls: type[StepModule]) -> list[int]:
    """Evaluate each of the first parts once for each operation, and run out there; return how many there were."""
    original, failures = cls.evaluate, []

    def evaluate(self: StepModule, micro_batch: Any) -> None:
        for operation in itertools.count(1):
            try:
                with RunsOutAt(operation if len(failures) < 2 else -1):
                    original(self, micro_batch)
            except torch.OutOfMemoryError:
                continue
            failures.append(operation - 1)
            return

    monkeypatch.setattr(cls, "evaluate", evaluate)
    return failures


def arguments(kind: str, fit_args: list[str], folder: Path) -> list[str]:
    if kind == "SFT":
        return fit_args
    short = ["--trainer.max_steps", "2", "--generations.rows", "0"]
    if kind == "Pretrain":
        texts = folder / "texts.txt"
        lines = [
            f"Kalimat {i} tentang kota {i * 7 % 50} dan pulau {i * 3 % 11}" for i in range(400)
        ]
        texts.write_text("\n".join(lines))
        data = ["--data", "TextData", "--data.path", str(texts), "--data.max_length", "64"]
        model = ["--model.tokenizer", str(TOKENIZER), "--model.from_config", json.dumps(EXPERTS)]
        return ["--model", kind, *model, *data, "--data.batch_size", "4", *short]
    model = fit_args[fit_args.index("--model.model_name_or_path") :][:2]
    data = ["--data", "PreferenceData", "--data.path", str(write_pairs(folder / "pairs.jsonl"))]
    return ["--model", kind, *model, *data, "--data.batch_size", "8", *short]


@pytest.mark.parametrize("kind", ["SFT", "Pretrain", "DPO", "Reward"])
def test_each_row_is_counted_once_wherever_memory_runs_out(
    kind: str,
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import fine_tune.modules as modules

    args = ["--vram_guard.rehearse", "false", *arguments(kind, fit_args, tmp_path)]

    def measured(name: str) -> tuple[dict[str, float], list[dict[str, str]], Any]:
        outcome: Outcome = command_line("fit", *args, "--name", name)
        assert outcome.code == 0, outcome.err
        run = outcome.run(name)
        evaluations = [
            {key: row[key] for key in row if key.startswith("val")}
            for row in outcome.metrics(name)
            if row.get("val/loss")
        ]
        rows = np.load(run.path / "validation_rows.npy")
        return run.read()["results"][-1]["metrics"], evaluations, rows

    expected = measured("straight")
    failures = run_out_at_every_operation(monkeypatch, getattr(modules, kind))
    found = measured("out_of_memory")
    assert sum(failures) > 100
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert np.array_equal(found[2], expected[2])
