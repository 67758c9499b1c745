"""What is recomputed, or kept on the host, changes memory and not a bit of the weights."""

from typing import Any

import pytest
import torch
from harness import CommandLine, assert_same_weights

from fine_tune.modules import recomputing


@pytest.mark.parametrize("more", [[], ["--model.lora.r", "4"]], ids=["full", "lora"])
@pytest.mark.parametrize("how", ["true", "selective"])
def test_gradient_checkpointing_changes_nothing(
    command_line: CommandLine, fit_args: list[str], how: str, more: list[str]
) -> None:
    args = [*fit_args, "--model.config.attention_dropout", "0.1", *more]
    plain = command_line("fit", *args).run()
    outcome = command_line("fit", *args, "--model.gradient_checkpointing", how)
    assert outcome.code == 0, outcome.err
    assert_same_weights(plain.checkpoint("last"), outcome.run(version=1).checkpoint("last"))


def test_offloading_changes_nothing(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputing, "LEAST_MOVED", 0)
    plain = command_line("fit", *fit_args).run()
    moved: list[torch.Size] = []
    empty = torch.empty

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "pin_memory" in kwargs:
            moved.append(args[0])
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    outcome = command_line("fit", *fit_args, "--model.offload_activations", "true")
    assert outcome.code == 0, outcome.err
    assert moved
    assert_same_weights(plain.checkpoint("last"), outcome.run(version=1).checkpoint("last"))


def test_weights_are_not_offloaded() -> None:
    layer, copied = torch.nn.Linear(512, 512), []
    rows = torch.randn(4, 512, requires_grad=True)
    copy = torch.Tensor.copy_

    def noted(self: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(source.shape)
        return copy(self, source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, recomputing.kept_on_host(layer, active=True):
        patch.setattr(torch.Tensor, "copy_", noted)
        patch.setattr(recomputing, "LEAST_MOVED", 0)
        result = layer(rows)
    assert copied == [(4, 512)]  # what came in; the weights, 512 x 512, stay
    result.sum().backward()
    torch.testing.assert_close(rows.grad, layer.weight.sum(0).expand(4, 512))


def bytes_kept(how: recomputing.Recomputing) -> int:
    """Return the bytes that the backward pass of a small Llama holds on to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    recomputing.recompute(model, how)
    from fine_tune.memory import LiveBytes

    live = LiveBytes(model.parameters(), lambda _: "all")
    with live:
        logits = model(torch.arange(48)[None] % 64, use_cache=False).logits
    kept = live.now.total()
    del logits
    return kept


def test_selective_keeps_less_than_all_and_more_than_the_inputs() -> None:
    everything, selected, inputs = (bytes_kept(how) for how in (False, "selective", True))
    assert inputs < selected < everything
