"""LoRA and QLoRA end to end on a CPU: frozen weights stay as they are, only adapters travel, resume is exact."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from harness import CommandLine
from lora_runs import (
    SIZES,
    TOKENS,
    assert_same_adapter,
    run_and_resume,
    save_model,
    save_quantized,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from fine_tune.adapters import auto_lora


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2"])
def test_qlora_trains_resumes_and_tests(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    architecture: str,
    quantization: str,
) -> None:
    folder = save_model(architecture, tmp_path / architecture)
    args = [*fit_args, "--model.model_name_or_path", str(folder), "--model.lora", "auto"]
    args += ["--model.quantization", quantization, "--model.optimizer.lr", "1e-2"]
    args += ["--checkpoint.every", "3", "--trainer.val_check_interval", "4"]
    straight = command_line("fit", *args, "--name", "straight")
    assert straight.code == 0, straight.err
    losses = [float(row["train/loss"]) for row in straight.metrics("straight")]
    assert losses[-1] < losses[0] - 0.3
    last = straight.run("straight").checkpoint("last")
    assert last is not None
    assert {p.name for p in last.glob("*.safetensors")} == {"adapter_model.safetensors"}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), last)

    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "6"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    ours = load_file(resumed.run().checkpoint("last") / "adapter_model.safetensors")  # type: ignore[operator]
    theirs = load_file(last / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    config = straight.run("straight").path / "config.yaml"
    tested = command_line("test", "--config", config, "--ckpt_path", "best", root=False)
    assert tested.code == 0, tested.err


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2"])
def test_the_quantized_weights_are_left_alone(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    quantization: str,
) -> None:
    from fine_tune.modules import SFT

    seen: list[dict[str, torch.Tensor]] = []

    def remember(self: SFT) -> None:
        frozen = {n: p for n, p in self.named_parameters() if "lora_" not in n}
        seen.append({name: parameter.detach().clone() for name, parameter in frozen.items()})
        if len(seen) == 1:
            kinds = {type(m).__name__ for m in self.modules()}
            assert "Linear4bit" in kinds
            assert self.model.get_input_embeddings().weight.dtype == torch.float32  # type: ignore[union-attr]

    monkeypatch.setattr(SFT, "on_fit_start", remember)
    monkeypatch.setattr(SFT, "on_fit_end", remember)
    folder = save_model(architecture, tmp_path / architecture)
    args = [
        "--model.model_name_or_path",
        folder,
        "--model.quantization",
        quantization,
        "--model.lora",
        "auto",
    ]
    assert command_line("fit", *fit_args, *args).code == 0
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_quantization_without_lora_is_refused(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--model.quantization", "nf4")
    assert outcome.code == 2
    assert "set model.lora" in outcome.err


@pytest.mark.parametrize(
    ("config", "targets", "rank", "rslora"),
    [
        (LlamaConfig(**SIZES), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 8, False),
        (PhiConfig(**SIZES), "q_proj k_proj v_proj dense fc1 fc2", 8, False),
        (GPT2Config(n_embd=64, n_layer=1, n_head=4), "c_attn c_proj c_fc", 8, False),
        (PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
                   num_attention_heads=32), "q_proj k_proj v_proj dense fc1 fc2", 16, False),
        (LlamaConfig(), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", 32, True),
        (Qwen3MoeConfig(hidden_size=64, num_hidden_layers=1, num_experts=4, moe_intermediate_size=32,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=16),
         "q_proj k_proj v_proj o_proj", 8, False),
    ],
    ids=["llama", "phi", "gpt2", "phi-2", "llama-7b", "moe"],
)  # fmt: skip
def test_auto_lora_follows_size_and_architecture(
    config: PreTrainedConfig, targets: str, rank: int, rslora: bool
) -> None:
    lora = auto_lora(config)
    assert set(lora.target_modules or []) == set(targets.split())
    assert (lora.r, lora.lora_alpha, lora.use_rslora, lora.lora_dropout) == (
        rank,
        2 * rank,
        rslora,
        0,
    )


def test_the_settings_that_auto_chose_are_shown(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--model.lora", "auto")
    assert "LoRA r=8 alpha=16 on down_proj, gate_proj, k_proj" in outcome.out
    assert "of them trained" in outcome.out
    adapter = outcome.run().checkpoint("last") / "adapter_config.json"  # type: ignore[operator]
    assert json.loads(adapter.read_text())["r"] == 8


@pytest.mark.parametrize("asked", [[], ["--model.quantization", "nf4"]])
def test_a_checkpoint_quantized_already_trains_resumes_and_tests(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    ends: list[dict[str, Any]],
    asked: list[str],
) -> None:
    folder = save_quantized("nf4", tmp_path / "llama-bnb-4bit")
    args = [*fit_args, "--model.model_name_or_path", str(folder), "--model.lora", "auto", *asked]
    straight, resumed = run_and_resume(command_line, [*args, "--data.epochs", "4"], stop=5)
    assert_same_adapter(straight, resumed)
    assert "nf4 + LoRA r=8" in straight.out
    losses = [float(row["train/loss"]) for row in straight.metrics("straight")]
    assert losses[-1] < losses[0] - 0.3

    end = ends[0]
    assert end["compute"] == {torch.float32}  # the trainer's, not the bfloat16 of config.json
    assert end["packed_for_cpu"] == {False}
    assert (end["embedding"], end["head"], end["trained"]) == (
        torch.float32, torch.float32, {torch.float32},
    )  # fmt: skip
    packed = [name for name, weight in end["before"].items() if weight.dtype == torch.uint8]
    assert len(packed) == 2 * 7
    assert all(torch.equal(end["before"][name], end["after"][name]) for name in end["before"])

    last = straight.run("straight").checkpoint("last")
    assert last is not None
    assert {p.name for p in last.glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(folder)
    ours = {name.removeprefix("model.base_model.model.").replace(".base_layer", ""): weight
            for name, weight in end["after"].items()}  # fmt: skip
    stored = {name: p for name, p in base.named_parameters() if p.dtype == torch.uint8}
    assert len(stored) == 2 * 7
    assert all(torch.equal(weight, ours[name]) for name, weight in stored.items())
    in_peft = PeftModel.from_pretrained(base, last).float().eval()
    for layer in in_peft.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.compute_dtype = torch.float32  # as the run computed
            layer.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(in_peft(TOKENS).logits, end["logits"])

    config = straight.run("straight").path / "config.yaml"
    tested = command_line("test", "--config", config, "--ckpt_path", "best", root=False)
    assert tested.code == 0, tested.err


def test_an_8_bit_checkpoint_trains_and_resumes(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, ends: list[dict[str, Any]]
) -> None:
    folder = save_quantized("int8", tmp_path / "llama-int8")
    args = [*fit_args, "--model.model_name_or_path", str(folder), "--model.lora", "auto"]
    args += ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", "3"]
    assert_same_adapter(*run_and_resume(command_line, args))
    end = ends[0]
    assert {p.dtype for p in end["after"].values()} == {torch.int8, torch.bfloat16}
    assert all(torch.equal(end["before"][name], end["after"][name]) for name in end["before"])


def test_a_quantized_checkpoint_is_refused_before_its_weights_load(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fine_tune import models

    folder = save_quantized("int8", tmp_path / "llama-int8")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    args = [*fit_args, "--model.model_name_or_path", folder]
    without = command_line("fit", *args)
    assert without.code == 2
    assert "its weights are stored in int8, and quantized weights are frozen" in without.err
    other = command_line("fit", *args, "--model.lora", "auto", "--model.quantization", "nf4")
    assert other.code == 2
    assert "nf4 asked, but the checkpoint's weights are stored in int8" in other.err
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    gptq = command_line("fit", *args, "--model.lora", "auto")
    assert gptq.code == 2
    assert "quantized by 'gptq', which cannot be trained here" in gptq.err


@pytest.mark.parametrize(
    ("precision", "settings", "frozen", "trained"),
    [
        ("bf16-mixed", ["--model.lora", "auto"], torch.bfloat16, torch.float32),
        ("bf16-mixed", ["--model.lora", "auto", "--model.quantization", "nf4"], torch.bfloat16, torch.float32),
        ("bf16-mixed", ["--model.lora", "auto", "--model.dtype", "float32"], torch.float32, torch.float32),
        ("bf16-mixed", ["--model.lora.target_modules", "[q_proj]", "--model.lora.modules_to_save", "[embed_tokens]",
                        "--model.lora.bias", "all"], torch.bfloat16, torch.float32),
        ("32-true", ["--model.lora", "auto"], torch.float32, torch.float32),
        ("bf16-true", ["--model.lora", "auto"], torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", [], torch.float32, torch.float32),
        ("bf16-true", [], torch.bfloat16, torch.bfloat16),
    ],
    ids=["lora", "nf4", "asked", "trained-layers", "32", "lora-true", "full", "full-true"],
)  # fmt: skip
def test_frozen_weights_have_the_type_of_the_precision(
    command_line: CommandLine,
    fit_args: list[str],
    ends: list[dict[str, Any]],
    precision: str,
    settings: list[str],
    frozen: torch.dtype,
    trained: torch.dtype,
) -> None:
    args = [*fit_args, *settings, "--trainer.precision", precision, "--trainer.max_steps", "3"]
    straight, resumed = run_and_resume(command_line, args)
    losses = [float(row["train/loss"]) for row in straight.metrics("straight")]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    assert losses == [float(row["train/loss"]) for row in resumed.metrics()]
    for end in (ends[0], ends[-1]):
        assert (end["head"], end["trained"]) == (frozen, {trained})
        assert end["embedding"] == (trained if "[embed_tokens]" in settings else frozen)
        assert end["compute"] == ({torch.bfloat16} if "nf4" in settings else set())
    if settings:
        assert_same_adapter(straight, resumed)
