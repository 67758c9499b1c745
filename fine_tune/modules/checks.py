"""What can be wrong with a module's settings, and with a plan held against its model: told before weights load."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fine_tune.adapters import INITS_THAT_CHANGE_THE_BASE
from fine_tune.batches import DataPlan
from fine_tune.errors import nearest
from fine_tune.model_config import stored_quantization
from fine_tune.saved_adapters import other_shape

_WHY_NOT_INIT = {
    "pissa_niter": "it draws random numbers, so a saved adapter could not find its base again; take pissa",
    **dict.fromkeys(
        ("eva", "corda", "lora_ga"), "it needs a pass over the data before training, not made here"
    ),
}


def attention_problems(asked: str | None) -> list[str]:
    """Say whether transformers has no such attention; whether this machine has what it needs shows when it loads."""
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if asked is None or asked in known or "/" in asked:  # of the hub's kernels
        return []
    how = nearest(asked, known) or "; use sdpa, eager, flex_attention, or leave it out"
    return [f"model.attn_implementation: '{asked}' is not known{how}"]


def source_problems(
    model_name_or_path: str | None, from_config: Any, quantization: str | None, lora: Any
) -> list[str]:
    """Say what does not go together among the settings that make the model."""
    problems = []
    if (model_name_or_path is None) == (from_config is None):
        given = "both" if from_config is not None else "neither"
        problems.append(
            f"model.model_name_or_path, model.from_config: give one of them, {given} given"
        )
    if quantization is not None and lora is None:
        problems.append(
            "model.quantization: quantized weights are frozen; set model.lora, like auto"
        )
    if quantization is not None and model_name_or_path is None:
        problems.append(
            "model.quantization: needs weights to quantize; set model.model_name_or_path"
        )
    return problems


def lora_problems(lora: Any, lora_plus_ratio: float | None, quantization: str | None) -> list[str]:
    """Say what is wrong with LoRA's own settings, and with the learning rate of its B matrices."""
    problems = []
    if lora_plus_ratio is not None and not 0 < lora_plus_ratio < float("inf"):
        problems.append(f"model.lora_plus_ratio: must be above 0 and finite, got {lora_plus_ratio}")
    if lora_plus_ratio is not None and lora is None:
        problems.append("model.lora_plus_ratio: there are no B matrices; set model.lora, like auto")
    problems += [  # null passes for any of peft's types
        f"model.lora.{name}: a number is wanted, got None; leave it out for peft's own"
        for name in ("r", "lora_alpha", "lora_dropout")
        if getattr(lora, name, 0) is None
    ]
    init = str(getattr(lora, "init_lora_weights", True)).lower()
    for refused, why in _WHY_NOT_INIT.items():
        if init.startswith(refused):
            problems.append(f"model.lora.init_lora_weights: {init} is not possible: {why}")
    if quantization is not None and init in INITS_THAT_CHANGE_THE_BASE:
        problems.append(_changes_quantized(init, quantization))
    return problems + (_loftq_problems(lora, quantization) if init == "loftq" else [])


def stored_quantization_problems(
    config: PreTrainedConfig, quantization: str | None, lora: Any
) -> list[str]:
    """Say what does not go together with weights that a checkpoint already holds quantized."""
    stored = stored_quantization(config)
    if stored is None:
        return []
    if stored not in ("nf4", "fp4", "int8"):
        return [
            f"model.model_name_or_path: its weights are quantized by '{stored}', which cannot be trained here; "
            "bitsandbytes nf4, fp4 and int8 can: take such a checkpoint, or an unquantized one and model.quantization"
        ]
    problems = []
    if lora is None:
        problems.append(
            f"model.model_name_or_path: its weights are stored in {stored}, and quantized weights are frozen; "
            "set model.lora, like auto"
        )
    if quantization not in (None, stored):
        problems.append(
            f"model.quantization: {quantization} asked, but the checkpoint's weights are stored in {stored}; "
            "leave it out, or take the unquantized model"
        )
    init = str(getattr(lora, "init_lora_weights", True)).lower()
    if quantization is None and init in INITS_THAT_CHANGE_THE_BASE:
        problems.append(_changes_quantized(init, stored))
    return problems


def continued_adapter_problems(folder: str, lora: Any) -> list[str]:
    """Say what stands against going on with the adapter in a folder, its base being quantized."""
    where = f"model.model_name_or_path: '{folder}' holds an adapter, which goes on being trained on its quantized base"
    if lora is None:
        return [f"{where}; set model.lora, like auto, which takes its settings over"]
    other = other_shape(lora, folder)
    fix = "set model.lora: auto, or leave quantization out, and it is merged into its base"
    return [f"{where}; it has {other}: {fix}"] if other else []


def score_head_problems(config: PreTrainedConfig) -> list[str]:
    """Say that transformers has no model with a scalar head of the config's kind, if so."""
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return []
    return [
        f"model.model_name_or_path: transformers has no {config.model_type} with a scalar head "
        "(...ForSequenceClassification); llama, qwen2, qwen3, phi, gpt2, mistral, gemma and others have one"
    ]


def _loftq_problems(lora: Any, quantization: str | None) -> list[str]:
    key, problems = "model.lora.init_lora_weights: loftq", []
    if quantization not in ("nf4", "fp4"):
        problems.append(f"{key} makes up for what 4 bits lose; set model.quantization: nf4")
    if not torch.cuda.is_available():
        problems.append(f"{key} is computed by peft on a CUDA device, and there is none here")
    if lora.lora_alpha != lora.r or lora.use_rslora:
        problems.append(
            f"{key} is added with the factor lora_alpha / r, which must be 1: set model.lora.lora_alpha: {lora.r}, "
            f"got {lora.lora_alpha}{' with use_rslora' if lora.use_rslora else ''}"
        )
    return problems


def _changes_quantized(init: str, kind: str) -> str:
    return (
        f"model.lora.init_lora_weights: {init} changes the base's weights, and {kind} weights stay as they are; "
        "leave it out, or train without quantization"
    )


def warmup_problems(steps: int | None, ratio: float | None) -> list[str]:
    """Say what is wrong with the length of the warm-up."""
    problems = []
    if steps is not None and ratio is not None:
        problems.append("model.warmup_steps, model.warmup_ratio: give one of them, not both")
    if steps is not None and steps < 0:
        problems.append(f"model.warmup_steps: must not be negative, got {steps}")
    if ratio is not None and not 0 <= ratio <= 1:
        problems.append(f"model.warmup_ratio: must lie between 0 and 1, got {ratio}")
    return problems


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest row a model's positions allow, or None if its config sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions is not None else None


def plan_problems(plan: DataPlan, config: PreTrainedConfig, num_warmup_steps: int) -> list[str]:
    """Say where the data does not fit the model, or the warm-up the planned epochs."""
    positions, longest = max_positions(config), max(plan.longest_row.values())
    problems = []
    if positions is not None and longest > positions:
        problems.append(
            f"data.max_length: {plan.max_length} lets rows of {longest} tokens through, but the model has "
            f"{positions} positions; set --data.max_length {positions}"
        )
    if plan.largest_token_id >= config.vocab_size:
        problems.append(
            f"model.tokenizer: it gives token id {plan.largest_token_id}, but the model's vocabulary has "
            f"{config.vocab_size} entries; this is another model's tokenizer"
        )
    if num_warmup_steps > plan.planned_steps:
        problems.append(
            f"model.warmup_steps: {num_warmup_steps} is longer than the {plan.planned_steps} steps of all epochs "
            f"({plan.steps_per_epoch} per epoch); lower it or give model.warmup_ratio"
        )
    return problems
