"""QLoRA end to end on a CPU: 4-bit weights stay as they are, only adapters travel, resume is exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TOKENIZER, CommandLine
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from fine_tune.adapters import auto_lora

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_model(architecture: str, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    config: PreTrainedConfig = {
        "llama": lambda: LlamaConfig(**SIZES, **ids, intermediate_size=128),
        "phi": lambda: PhiConfig(**SIZES, **ids, intermediate_size=128),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, **ids),
    }[architecture]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def test_the_quantized_weights_are_left_alone(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fine_tune.modules import SFT

    seen: list[dict[str, torch.Tensor]] = []

    def remember(self: SFT) -> None:
        frozen = {n: p for n, p in self.named_parameters() if "base_layer" in n or "embed" in n}
        seen.append({name: parameter.detach().clone() for name, parameter in frozen.items()})
        if len(seen) == 1:
            kinds = {type(m).__name__ for m in self.modules()}
            assert "Linear4bit" in kinds
            assert self.model.get_input_embeddings().weight.dtype == torch.float32  # type: ignore[union-attr]

    monkeypatch.setattr(SFT, "on_fit_start", remember)
    monkeypatch.setattr(SFT, "on_fit_end", remember)
    folder = save_model("llama", tmp_path / "llama")
    args = [
        "--model.model_name_or_path",
        folder,
        "--model.quantization",
        "nf4",
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
