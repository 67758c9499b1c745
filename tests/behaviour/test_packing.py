"""Rows behind one another, without padding, are the same rows: logits, gradients, whole runs."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import CommandLine
from safetensors.torch import load_file
from small_models import save_small_model, small_config

from fine_tune.batches import SFTBatch
from fine_tune.losses import IGNORE_INDEX
from fine_tune.modules.packing import (
    CAUSAL,
    VARLEN,
    attending_by,
    attention_without_masks,
    packed,
    same_logits,
    why_padded,
)

LENGTHS = [11, 6, 6, 1]


def rows_of(vocabulary: int) -> SFTBatch:
    """Rows of uneven length, padded with a token that would be seen if anything saw it."""
    ids = torch.randint(5, vocabulary, (4, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = IGNORE_INDEX
    return SFTBatch(
        input_ids_BT=ids,
        labels_BT=labels,
        lengths=LENGTHS,
        num_supervised=[length - 1 for length in LENGTHS],
        row_ids=[0, 1, 2, 3],
    )


def test_rows_stand_behind_one_another_and_count_from_zero() -> None:
    batch = SFTBatch(
        input_ids_BT=torch.tensor([[5, 6, 7], [8, 9, 0]]),
        labels_BT=torch.tensor([[5, 6, 7], [IGNORE_INDEX, 9, IGNORE_INDEX]]),
        lengths=[3, 2],
        num_supervised=[2, 1],
        row_ids=[0, 1],
    )
    inputs, labels = packed(batch)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert inputs["max_length_q"] == 3
    # the 5 is predicted by nothing, and the 8 by nothing of its own row
    assert labels.tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]]


def attend_row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's kernel computes on a GPU, one row after the other."""
    assert ends.tolist() == key_ends.tolist()
    assert window_size == (-1, 0)
    assert longest == longest_key == max(ends.diff())
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def uncompiled() -> Any:
    return torch.compiler.set_stance("force_eager")


def logits_of_each_alone(model: Any, rows_BT: torch.Tensor) -> torch.Tensor:
    with uncompiled(), torch.no_grad():
        alone = [
            model(rows_BT[row : row + 1, :length], use_cache=False).logits[0]
            for row, length in enumerate(LENGTHS)
        ]
    return torch.cat(alone)


def save(architecture: str, folder: Path) -> Any:
    heads = {"num_key_value_heads": 2} if architecture in ("llama", "qwen2") else {}
    return save_small_model(folder, architecture, **heads).eval()


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        (architecture, attention)
        for architecture in ("llama", "gpt2", "phi", "qwen2")
        for attention in ("sdpa", "eager", "flex_attention", VARLEN)
        if (architecture, attention) != ("gpt2", "flex_attention")  # transformers has none
    ],
)
def test_packed_logits_are_those_of_each_row_alone(
    architecture: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(architecture, tmp_path / "model")
    if attention == VARLEN:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_row_by_row)
    else:
        model.set_attn_implementation(attention)
    own = VARLEN if attention == VARLEN else None
    batch = rows_of(model.config.vocab_size)
    # as written: compiled for a CPU, flex attention fails on this mask
    with uncompiled(), torch.no_grad(), attending_by(model, own):
        together = model(**packed(batch)[0], use_cache=False).logits[0]
    assert model.config._attn_implementation == (attention if own is None else "sdpa")
    with (
        uncompiled(),
        torch.set_grad_enabled(attention != "flex_attention"),
    ):  # no backward on a CPU
        assert same_logits(model, own, pack=True)
    alone = logits_of_each_alone(model, batch["input_ids_BT"])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "qwen2"])
def test_padded_rows_need_no_mask(architecture: str, tmp_path: Path) -> None:
    model = save(architecture, tmp_path / "model")
    assert list(attention_without_masks(model, torch.bfloat16)) == []  # nobody waits for a CPU
    elsewhere = copy.deepcopy(model).to("meta")
    assert list(attention_without_masks(elsewhere, torch.bfloat16)) == [CAUSAL]
    assert same_logits(model, CAUSAL, pack=False)
    rows = rows_of(model.config.vocab_size)["input_ids_BT"]
    with torch.no_grad(), attending_by(model, CAUSAL):
        padded = model(rows, use_cache=False).logits
    found = torch.cat([padded[row, :length] for row, length in enumerate(LENGTHS)])
    torch.testing.assert_close(found, logits_of_each_alone(model, rows), rtol=1e-5, atol=1e-5)


def test_windows_are_left_to_the_model(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "m", "mistral", num_key_value_heads=2, sliding_window=4)
    elsewhere = copy.deepcopy(model).to("meta")
    assert list(attention_without_masks(elsewhere, torch.bfloat16)) == []
    assert not same_logits(model, CAUSAL, pack=False)


def test_a_model_that_ignores_where_rows_end_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = save_small_model(tmp_path / "model")

    def see_all(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
        whole = torch.tensor([0, len(query)])
        return attend_row_by_row(query, key, value, whole, whole, len(query), len(query), **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", see_all)
    assert not same_logits(model, VARLEN, pack=True)
    assert model.training


def test_a_kernel_that_fails_is_not_used(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    assert not same_logits(model, VARLEN, pack=True)  # torch's own, which a CPU does not have


def no_groups(query: Any, *, scale: float, window_size: tuple[int, int]) -> None: ...


@pytest.mark.parametrize(
    ("kernel", "computes_in", "told"),
    [
        (attend_row_by_row, torch.bfloat16, None),
        (attend_row_by_row, torch.float32, "takes 16 bit, and this computes in float32"),
        (no_groups, torch.bfloat16, f"of torch {torch.__version__} takes no enable_gqa"),
        (None, torch.bfloat16, "has no kernel for packed rows (torch.nn.attention.varlen)"),
    ],
)
def test_a_torch_without_the_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, computes_in: torch.dtype, told: str | None
) -> None:
    if kernel is None:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model = SimpleNamespace(config=small_config(), device=torch.device("cuda"))
    model.config._attn_implementation = "sdpa"
    why = why_padded(model, computes_in)
    assert (why is None) == (told is None) and (told or "") in (why or "")
    kinds = list(attention_without_masks(model, computes_in))
    assert kinds == ([CAUSAL] if told else [VARLEN, CAUSAL])
    model.config._attn_implementation = "eager"
    assert "stands in for sdpa, not for eager" in str(why_padded(model, computes_in))


@pytest.mark.parametrize("own", [[], ["--model.pack_rows", "false"]], ids=["open", "padded"])
def test_a_run_says_once_why_its_rows_are_padded(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, own: list[str]
) -> None:
    monkeypatch.setattr("fine_tune.modules.token_rows.why_padded", lambda *_: "torch is too old")
    outcome = command_line("fit", *fit_args, *own, "--trainer.max_steps", "1")
    assert outcome.code == 0, outcome.err
    line = "rows of a micro-batch are padded: torch is too old"
    assert outcome.out.count(line) == (0 if own else 1)


@pytest.mark.parametrize(
    "more", [[], ["--model.lora.r=4", "--model.gradient_checkpointing=true"]], ids=["full", "lora"]
)
def test_a_run_with_packed_rows_has_the_weights_of_one_with_padded(
    command_line: CommandLine, fit_args: list[str], more: list[str]
) -> None:
    weights = []
    for version, pack in enumerate(("false", "true")):
        outcome = command_line("fit", *fit_args, "--model.pack_rows", pack, *more)
        assert outcome.code == 0, outcome.err
        assert ("rows of a micro-batch are packed" in outcome.out) == (pack == "true")
        last = outcome.run(version=version).checkpoint("last")
        assert last is not None
        name = "adapter_model.safetensors" if more else "model.safetensors"
        weights.append(
            (load_file(last / name), [float(r["train/loss"]) for r in outcome.metrics()])
        )
    (padded, losses), (together, others) = weights
    assert others == pytest.approx(losses, rel=1e-5)
    apart = sum(float((padded[n] - together[n]).square().sum()) for n in padded)
    size = sum(float(value.square().sum()) for value in padded.values())
    assert (apart / size) ** 0.5 < 1e-4
    assert any(not torch.equal(padded[name], together[name]) for name in padded)  # it was used


def test_a_run_that_falls_back_to_32_bit_is_padded_again(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fine_tune.modules import SFT, token_rows

    def as_on_a_gpu(_: Any, computes_in: torch.dtype) -> Any:
        return iter([CAUSAL] if computes_in == torch.float32 else [VARLEN, CAUSAL])

    packs: list[bool] = []

    def after(self: SFT, *_: Any) -> None:
        packs.append(self.packs)
        if len(packs) == 2:
            self.lower_precision("32-true")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_row_by_row)
    monkeypatch.setattr(token_rows, "attention_without_masks", as_on_a_gpu)
    monkeypatch.setattr(SFT, "on_train_batch_end", after)
    outcome = command_line("fit", *fit_args, "--trainer.precision", "bf16-mixed")
    assert outcome.code == 0, outcome.err
    assert packs == [True] * 2 + [False] * (len(packs) - 2)
    assert len(packs) > 4


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "qwen2"])
def test_varlen_on_a_gpu_is_as_close_to_float32_as_padding_is(
    architecture: str, tmp_path: Path
) -> None:
    heads = {"num_key_value_heads": 2} if architecture in ("llama", "qwen2") else {}
    model: Any = save_small_model(
        tmp_path / "model", architecture, hidden_size=256, num_attention_heads=4, **heads
    )
    model = model.eval().cuda()
    batch = rows_of(model.config.vocab_size)
    rows = batch["input_ids_BT"].cuda()
    batch = SFTBatch(**{**batch, "input_ids_BT": rows, "labels_BT": batch["labels_BT"].cuda()})  # type: ignore[typeddict-item]

    def real(padded_BTV: torch.Tensor) -> torch.Tensor:
        return torch.cat([padded_BTV[row, :length] for row, length in enumerate(LENGTHS)]).float()

    with torch.no_grad():
        exact = real(model(rows, use_cache=False).logits)
        model = model.bfloat16()
        assert VARLEN in attention_without_masks(model, torch.bfloat16)
        padded = real(model(rows, use_cache=False).logits)
        with attending_by(model, VARLEN):
            together = model(**packed(batch)[0], use_cache=False).logits[0].float()
    assert same_logits(model, VARLEN, pack=True)
    wide, narrow = (torch.linalg.norm(x - exact) for x in (together, padded))
    assert wide <= 2 * narrow
