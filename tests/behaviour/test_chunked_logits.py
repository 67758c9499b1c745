"""Logits that would fill the device are computed in chunks: the same losses and gradients, less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine
from safetensors.torch import load_file
from small_models import save_small_model, small_config

from fine_tune.losses import nll_per_token
from fine_tune.memory import LiveBytes
from fine_tune.modules.lm_head import LogitChunks, head_at, is_last, nll_in_chunks

POSITIONS, TARGETS = torch.tensor([1, 2, 5, 12, 13, 20, 21]), torch.tensor([9, 8, 7, 6, 5, 4, 3])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("at_once", [1, 3, 7, 50])
def test_chunks_give_the_same_loss_and_gradient(
    architecture: str, at_once: int, tmp_path: Path
) -> None:
    model: Any = save_small_model(tmp_path / "model", architecture).eval()  # without dropout
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with head_at(model, POSITIONS):
        logits = model(input_ids=ids, use_cache=False).logits.squeeze(0)
    whole = nll_per_token(logits, TARGETS)
    whole.sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chunked = nll_in_chunks(model, {"input_ids": ids}, POSITIONS, TARGETS, at_once)
    chunked.sum().backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        apart = torch.linalg.norm(parameter.grad - wanted[name])
        assert apart <= 1e-5 * torch.linalg.norm(wanted[name]) + 1e-7, name
    assert is_last(model)


def test_a_model_that_caps_its_logits_is_not_chunked(tmp_path: Path) -> None:
    capped = {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": None}
    model: Any = save_small_model(
        tmp_path / "gemma", "gemma2", final_logit_softcapping=2.0, initializer_range=0.5, **capped
    )
    assert not is_last(model)
    assert LogitChunks(model.config, 2**10).at_once(model, 10**6) is None
    model.config.final_logit_softcapping, name = None, "of_a_name_we_do_not_know"
    setattr(model.config, name, 2.0)
    chunks = LogitChunks(model.config, 2**10)
    model.config.final_logit_softcapping = 2.0  # the config says nothing; the model is tried
    assert chunks.most == 1
    assert chunks.at_once(model, 10**6) is None


def test_a_sixteenth_of_the_memory_is_for_logits() -> None:
    config = small_config(vocab_size=32_000)
    chunks = LogitChunks(config, 16 * 2**30, checked=True)  # 2**30 bytes for 128,000 a token
    assert chunks.at_once(None, 8_388) is None
    assert chunks.at_once(None, 8_389) == 8_388
    assert LogitChunks(config, 1000, checked=True).at_once(None, 2) == 1
    assert LogitChunks(config, None).at_once(None, 10**9) is None


def test_chunks_take_less_memory(tmp_path: Path) -> None:
    model: Any = save_small_model(tmp_path / "model", vocab_size=20_000)
    ids, positions = torch.arange(64)[None], torch.arange(60)
    peaks = []
    for at_once in (60, 6):
        live = LiveBytes(model.parameters(), lambda _: "all")
        with live:
            nll = nll_in_chunks(model, {"input_ids": ids}, positions, ids[0, :60], at_once)
            nll.sum().backward()
        model.zero_grad(set_to_none=True)
        del nll
        peaks.append(live.at_peak.total())
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_with_chunked_logits_has_the_same_losses(
    command_line: CommandLine,
    fit_args: list[str],
    dpo_args: list[str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fine_tune.modules import lm_head

    runs, calls = [], []
    checkpoint = lm_head.checkpoint

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(lm_head, "checkpoint", noted)
    for version, at_once in enumerate((None, 5)):
        monkeypatch.setattr(LogitChunks, "at_once", lambda *_, n=at_once: n)
        calls.clear()
        outcome = command_line("fit", *(fit_args if kind == "sft" else dpo_args))
        assert outcome.code == 0, outcome.err
        assert bool(calls) == (at_once is not None)
        last = outcome.run(version=version).checkpoint("last")
        assert last is not None
        losses = [float(row["train/loss"]) for row in outcome.metrics(version=version)]
        runs.append((losses, load_file(last / "model.safetensors")))
    (losses, weights), (others, chunked) = runs
    assert others == pytest.approx(losses, rel=1e-5)
    apart = sum(float((weights[name] - chunked[name]).square().sum()) for name in weights)
    size = sum(float(value.square().sum()) for value in weights.values())
    assert (apart / size) ** 0.5 < 1e-4
