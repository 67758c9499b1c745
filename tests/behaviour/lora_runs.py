"""What the tests of LoRA and QLoRA share: small models in folders, and a run that is stopped and taken up again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine
from safetensors.torch import load_file
from small_models import save_small_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_model(architecture: str, folder: Path) -> Path:
    save_small_model(folder, architecture, **SIZES)
    return folder


STOP = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step"]
TOKENS = torch.arange(5, 25)[None]


def save_quantized(kind: str, folder: Path) -> Path:
    """A folder as ``unsloth/*-bnb-4bit`` are on the hub: packed weights, and how they were packed in config.json."""
    base = save_model("llama", folder.with_name(folder.name + "-base"))
    bits = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind != "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=bits
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def adapter(outcome: Any, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(outcome.run(name).checkpoint("last") / "adapter_model.safetensors")


def assert_same_adapter(straight: Any, resumed: Any) -> None:
    ours, theirs = adapter(straight, "straight"), adapter(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(value.count_nonzero() for name, value in ours.items() if "lora_B" in name)


def run_and_resume(command_line: CommandLine, args: list[str], stop: int = 2) -> tuple[Any, Any]:
    """A straight run, and one that fell over at a step and went on."""
    args = [*args, "--checkpoint.every", "1", "--model.optimizer.lr", "1e-2"]
    straight = command_line("fit", *args, "--name", "straight")
    assert straight.code == 0, straight.err
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *STOP, str(stop))
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    return straight, resumed
