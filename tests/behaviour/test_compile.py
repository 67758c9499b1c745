"""Compiled blocks give the same losses, up to rounding, and no graph a length."""

from typing import Any

import pytest
import torch
from harness import CommandLine
from small_models import save_small_model

from fine_tune.modules.compiling import repeated_blocks


@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")]
)
def test_the_repeated_blocks_are_found(architecture: str, name: str, tmp_path: Any) -> None:
    model = save_small_model(tmp_path / "model", architecture)
    assert [type(block).__name__ for block in repeated_blocks(model)] == [name] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "lora", "recomputed"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    command_line: CommandLine, fit_args: list[str], dpo_args: list[str], kind: str
) -> None:
    args = dpo_args if kind == "dpo" else fit_args
    args = [*args, *{"lora": ["--model.lora.r", "4"]}.get(kind, [])]
    args += {"recomputed": ["--model.gradient_checkpointing", "true"]}.get(kind, [])
    plain = [float(row["train/loss"]) for row in command_line("fit", *args).metrics()]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = command_line("fit", *args, "--model.compile", "true")
    assert compiled.code == 0, compiled.err
    losses = [float(row["train/loss"]) for row in compiled.metrics(version=1)]
    assert losses == pytest.approx(plain, rel=1e-4)
    # with and without gradients, one row or several, training or not; not one for each of the many lengths
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_without_a_compiler_the_user_is_told(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    refused = command_line("fit", *fit_args, "--model.compile", "true")
    assert refused.code == 2
    assert "model.compile: torch needs a C++ compiler" in refused.err
