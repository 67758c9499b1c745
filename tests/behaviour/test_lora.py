"""LoRA's variants: each trains, resumes and opens in peft, or is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from harness import CommandLine
from lora_runs import (
    TOKENS,
    assert_same_adapter,
    run_and_resume,
    save_model,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from fine_tune.adapters import add_lora
from fine_tune.model_config import load_config
from fine_tune.models import load_model, quantization_config

LOFTQ = [
    "--model.lora.init_lora_weights",
    "loftq",
    "--model.lora.loftq_config",
    '{"loftq_bits": 4}',
]
LOFTQ += ["--model.lora.r", "8"]


def test_lora_plus_runs_and_resumes(
    command_line: CommandLine, fit_args: list[str], ends: list[dict[str, Any]]
) -> None:
    args = [*fit_args, "--model.lora", "auto", "--trainer.max_steps", "3"]
    args += ["--model.lr_scheduler", "linear"]
    plain = command_line("fit", *args, "--name", "plain")
    assert plain.code == 0, plain.err
    args += ["--model.lora_plus_ratio", "16"]
    straight, resumed = run_and_resume(command_line, args)
    assert_same_adapter(straight, resumed)
    rates = [float(row["lr"]) for row in straight.metrics("straight")]
    assert rates == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])  # the rate of A
    assert [len(end["rates"]) for end in (ends[0], ends[1], ends[-1])] == [1, 2, 2]
    run = resumed.run()
    other = ["--model.lora_plus_ratio", "4", "--trainer.max_steps", "4", "--ckpt_path", "last"]
    refused = command_line("fit", "--config", run.path / "config.yaml", *other, root=False)
    assert refused.code == 2
    assert "model.lora_plus_ratio: the checkpoint was trained with 16.0" in refused.err


def test_wrong_lora_settings_are_told_together(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line(
        "fit", *fit_args, "--model.lora_plus_ratio", "-1", "--model.warmup_steps", "-1"
    )
    assert outcome.code == 2
    assert "model.lora_plus_ratio: must be above 0 and finite, got -1.0" in outcome.err
    assert "model.lora_plus_ratio: there are no B matrices; set model.lora" in outcome.err
    assert "model.warmup_steps: must not be negative" in outcome.err


@pytest.mark.parametrize(
    "variant",
    [
        ["--model.lora.use_dora", "true"],
        ["--model.lora.use_rslora", "true"],
        ["--model.lora.init_lora_weights", "pissa"],
        ["--model.lora.init_lora_weights", "olora"],
        ["--model.lora.init_lora_weights", "mica"],
        ["--model.lora.init_lora_weights", "pissa", "--model.lora.use_dora", "true"],
    ],
    ids=["dora", "rslora", "pissa", "olora", "mica", "pissa-dora"],
)
def test_lora_variants_resume_and_open_in_peft_on_the_base_they_started_from(
    command_line: CommandLine,
    fit_args: list[str],
    model_folder: Path,
    ends: list[dict[str, Any]],
    variant: list[str],
) -> None:
    targets = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj", "down_proj"]']
    straight, resumed = run_and_resume(
        command_line, [*fit_args, *targets, *variant, "--trainer.max_steps", "4"]
    )
    assert_same_adapter(straight, resumed)
    assert [row["train/loss"] for row in resumed.metrics()] == [
        row["train/loss"] for row in straight.metrics("straight")
    ]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    untrained = base(TOKENS).logits
    last = straight.run("straight").checkpoint("last")
    in_peft = PeftModel.from_pretrained(base, last).eval()
    torch.testing.assert_close(in_peft(TOKENS).logits, ends[0]["logits"])
    assert (ends[0]["logits"] - untrained).abs().max() > 1e-3

    run = straight.run("straight")
    validated = command_line(
        "validate", "--config", run.path / "config.yaml", "--ckpt_path", "best", root=False
    )
    assert validated.code == 0, validated.err
    first, again = (r["metrics"]["val/loss"] for r in run.read()["results"])
    assert first == again


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (["--model.lora.init_lora_weights", "pissa"], "init_lora_weights"),
        (["--model.lora.use_rslora", "true"], "use_rslora"),
        (["--model.lora.alpha_pattern", "{q_proj: 32}"], "alpha_pattern"),
    ],
)
def test_an_adapter_is_not_put_on_another_base_or_scale(
    command_line: CommandLine, fit_args: list[str], changed: list[str], field: str
) -> None:
    args = [*fit_args, "--model.lora.r", "4", "--model.lora.target_modules", '["q_proj"]']
    assert command_line("fit", *args, "--trainer.max_steps", "2").code == 0
    refused = command_line("test", *args, *changed, "--ckpt_path", "last")
    assert refused.code == 2
    assert f"has {field} " in refused.err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--model.lora.init_lora_weights", "pissa", "--model.quantization", "nf4"],
         "pissa changes the base's weights, and nf4 weights stay as they are"),
        ([*LOFTQ, "--model.quantization", "nf4"], "computed by peft on a CUDA device, and there is none here"),
        (LOFTQ, "loftq makes up for what 4 bits lose; set model.quantization: nf4"),
        ([*LOFTQ, "--model.lora.lora_alpha", "32"], "must be 1: set model.lora.lora_alpha: 8, got 32"),
        (["--model.lora.init_lora_weights", "eva"], "eva is not possible: it needs a pass over the data"),
        (["--model.lora.target_modules", '["q_prj"]'],
         "['q_prj'] are not in this LlamaForCausalLM; did you mean 'q_proj'?; its linear layers are named: down_proj"),
    ],
)  # fmt: skip
def test_lora_settings_that_cannot_be_had_are_refused(
    command_line: CommandLine, fit_args: list[str], settings: list[str], told: str
) -> None:
    refused = command_line("fit", *fit_args, *settings)
    assert refused.code == 2
    assert told in refused.err


def test_loftq_makes_up_for_what_4_bits_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import loftq_utils

    def on_cpu(quantized: Any, weight: torch.Tensor, num_bits: int, reduced_rank: int) -> Any:
        # peft's own steps (``_loftq_init_new``), which move the weights to a CUDA device first
        assert num_bits == 4
        lost = weight.float() - dequantize_4bit(quantized.data, quantized.quant_state)
        parts = loftq_utils._low_rank_decomposition(lost, reduced_rank=reduced_rank)
        return parts["R"], parts["L"]

    monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_cpu)
    folder = save_model("llama", tmp_path / "llama")
    config = load_config(str(folder), None, None)
    base = load_model(config, str(folder), quantization=quantization_config("nf4", torch.float32))
    lora = LoraConfig(
        r=16, lora_alpha=16, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
    )
    lora.target_modules = {"q_proj"}
    adapted = add_lora(base, lora, str(folder))
    weights = load_file(folder / "model.safetensors")
    for i, layer in enumerate(adapted.base_model.model.model.layers):
        projection = layer.self_attn.q_proj
        exact = weights[f"model.layers.{i}.self_attn.q_proj.weight"]
        stored = dequantize_4bit(
            projection.base_layer.weight.data, projection.base_layer.weight.quant_state
        )
        correction = projection.lora_B["default"].weight @ projection.lora_A["default"].weight
        assert (exact - stored - correction).norm() < 0.8 * (exact - stored).norm()
    adapted.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True


def test_an_adapters_base_is_known_by_its_weights_not_by_its_folder(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path / "llama")
    args = [*fit_args, "--model.model_name_or_path", str(folder), "--model.lora", "auto"]
    run = command_line("fit", *args).run()
    moved = folder.rename(tmp_path / "moved")
    config = ["--config", run.path / "config.yaml", "--model.model_name_or_path", moved]
    again = command_line("validate", *config, "--ckpt_path", "best", root=False)
    assert again.code == 0, again.err
    results = run.read()["results"]
    assert results[-1]["metrics"]["val/loss"] == results[0]["metrics"]["val/loss"]

    model = AutoModelForCausalLM.from_pretrained(moved)
    model.model.norm.weight.data += 1
    model.save_pretrained(moved)
    refused = command_line("validate", *config, "--ckpt_path", "best", root=False)
    assert refused.code == 2
    assert f"was trained on other weights than those of '{moved}'" in refused.err
