"""A step waits for the device once, however many micro-batches it has."""

from collections import Counter
from typing import Any

import pytest
import torch
from harness import CommandLine
from torch.utils._python_dispatch import TorchDispatchMode

# What hands a value, or a size that depends on values, from the device to the host.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::bincount",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::repeat_interleave",
}


class Waits(TorchDispatchMode):
    """Count the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or by_mask:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [10_000, 64], ids=["one micro-batch", "many"])
@pytest.mark.parametrize("kind", ["sft", "sft packed", "dpo", "reward"])
def test_a_step_waits_once(
    command_line: CommandLine,
    fit_args: list[str],
    dpo_args: list[str],
    reward_args: list[str],
    kind: str,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fine_tune import modules
    from fine_tune.modules import base, gradients, token_rows
    from fine_tune.modules.packing import CAUSAL, VARLEN

    taken: list[tuple[Counter[str], int]] = []
    original, micro_batches = gradients.gradients, []
    take_rows = {"sft": "SFT", "dpo": "DPO", "reward": "Reward"}[kind.split()[0]]

    def counted(module: Any, batch: Any) -> Any:
        micro_batches.clear()
        with Waits() as waits:
            result = original(module, batch)
        taken.append((waits.names, len(micro_batches)))
        return result

    cls = getattr(modules, take_rows)
    cut = cls.take_rows

    def noted(self: Any, batch: Any, rows: slice) -> Any:
        micro_batches.append(rows)
        return cut(self, batch, rows)

    monkeypatch.setattr(base, "gradients", counted)
    monkeypatch.setattr(cls, "take_rows", noted)
    args = {"sft": fit_args, "dpo": dpo_args, "reward": reward_args}[kind.split()[0]]
    if "packed" in kind:  # by a kernel that a CPU does not have; what it gives is of no matter here
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *_, **__: q)
        monkeypatch.setattr(token_rows, "attention_without_masks", lambda *_: iter([VARLEN]))
        monkeypatch.setattr(token_rows, "same_logits", lambda *_, **__: True)
    if kind == "sft":  # as on a GPU
        monkeypatch.setattr(token_rows, "attention_without_masks", lambda *_: iter([CAUSAL]))
    outcome = command_line(
        *("fit", *args),
        *("--data.max_tokens_per_micro_batch", budget, "--trainer.max_steps", 2),
        *("--vram_guard.rehearse", "false", "--data.split", "none"),
    )
    assert outcome.code == 0, outcome.err
    assert len(taken) == 2
    assert all((num > 1) == (budget == 64) for _, num in taken)
    for waits, _ in taken:
        assert dict(waits) == {"aten::_local_scalar_dense": 1}
