"""Fixtures of the tests of LoRA, QLoRA and preferences."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from lora_runs import TOKENS
from preference_runs import write_pairs


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the models were at the end of each fit: types, logits, and the frozen weights at start and end."""
    from fine_tune.modules import SFT

    seen: list[dict[str, Any]] = []

    def frozen(module: SFT) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}

    def start(self: SFT) -> None:
        seen.append({"before": frozen(self)})

    def end(self: SFT) -> None:
        assert self.model is not None
        kinds = [m for m in self.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        self.model.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            logits = self.model(TOKENS).logits
        seen[-1] |= {
            "after": frozen(self),
            "embedding": self.model.get_input_embeddings().weight.dtype,
            "head": self.model.get_output_embeddings().weight.dtype,
            "trained": {p.dtype for p in self.parameters() if p.requires_grad},
            "compute": {m.compute_dtype for m in kinds},
            "packed_for_cpu": {m.support_avx512bf16_for_cpu for m in kinds},
            "rates": [group["lr"] for group in self.trainer.optimizers[0].param_groups],
            "logits": logits,
        }

    monkeypatch.setattr(SFT, "on_fit_start", start)
    monkeypatch.setattr(SFT, "on_train_end", end)
    return seen


@pytest.fixture
def dpo_args(model_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of a run of 10 steps of 8 pairs."""
    return [
        *("--model", "fine_tune.modules.DPO", "--model.model_name_or_path", str(model_folder)),
        *("--data", "fine_tune.data.PreferenceData"),
        *("--data.path", str(write_pairs(tmp_path / "pairs.jsonl"))),
        *("--data.batch_size", "8", "--data.epochs", "2", "--model.optimizer.lr", "3e-3"),
        *("--trainer.log_every_n_steps", "1", "--generations.rows", "0", "--report", "null"),
    ]


@pytest.fixture
def reward_args(dpo_args: list[str]) -> list[str]:
    """The same for a reward model."""
    return ["fine_tune.modules.Reward" if a.endswith(".DPO") else a for a in dpo_args]
