"""LoRA adapters: chosen, checked and put around a model."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import (
    LoraConfig,
    get_peft_model,
    replace_lora_weights_loftq,
)
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fine_tune.errors import UserError, nearest
from fine_tune.models import AUTO_CLASSES, Head

# What peft changes of the base when it makes the adapter, it changes again when it opens the saved one.
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora")
TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}  # by the latter peft trains the scalar head as well
PEFTS_OWN = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "revision", "runtime_config", "loftq_config"),
)
NEVER_ADAPTED = ("experts", "router", "gate", "shared_expert_gate")  # any part of a layer's path
REFUSED_BY_PEFT = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "nemotron_h",
)  # on their out_proj


def add_lora(
    model: PreTrainedModel, lora: Any, weights: str | None = None, head: Head = "lm"
) -> Any:
    """Wrap a model in trainable LoRA adapters and freeze the rest.

    Args:
        model: The base model.
        lora: A ``peft.LoraConfig``; its target names must exist in the model. ``init_lora_weights: loftq`` makes the
            first adapter what 4 bits lost of the weights (LoftQ, arXiv 2310.08659); saved, it is an ordinary one.
        weights: Folder or hub name of the unquantized weights; LoftQ compares with them.
        head: The model's; a scalar one is trained beside the adapters.

    Raises:
        UserError: Targets that do not exist, with the linear layers that do.
    """
    lora = copy.deepcopy(lora)
    lora.task_type = TASKS[head]
    names = linear_layer_names(model)
    loftq = lora.init_lora_weights == "loftq"
    if loftq:
        lora.init_lora_weights, lora.loftq_config = True, {}
    try:
        adapted = get_peft_model(model, lora)
    except re.error as error:
        of = [key for key, value in vars(lora).items() if value == error.pattern]
        raise UserError(
            f"model.lora{''.join(f'.{key}' for key in of[:1])}: {error.pattern!r} is no regular expression: {error.msg}"
        ) from error
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise UserError(f"model.lora: {' '.join(str(error).split())}") from error
        raise UserError(_unknown_targets(listed(lora.target_modules), model, names)) from error
    if loftq and weights is not None:
        replace_lora_weights_loftq(adapted, weights if Path(weights).is_dir() else None)
    return adapted


def auto_lora(config: PreTrainedConfig) -> LoraConfig:
    """Choose LoRA settings from the model's size: all linear layers, never routed experts or routers.

    Up to 0.6B weights r 8 and alpha 16; up to 3B 16 and 32; above, the same with rank-stabilised scaling (rsLoRA,
    arXiv 2312.03732); from 6B 32 and 64 with rsLoRA. No dropout.
    """
    model = _shape_of(config, "lm")
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    rank = 8 if billions <= 0.6 else 16 if billions < 6 else 32
    paths = linear_layers(model)
    routed = [path for path in paths if set(path.split(".")) & set(NEVER_ADAPTED)]
    targets = {path.split(".")[-1] for path in paths if path not in routed}
    if config.model_type in REFUSED_BY_PEFT:
        targets -= {"out_proj"}
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        use_rslora=billions > 3,
        target_modules=sorted(targets),
    )
    if any(path.split(".")[-1] in targets for path in routed):
        lora.exclude_modules = rf"(.*\.)?({'|'.join(NEVER_ADAPTED)})(\..*)?"
    with torch.device("meta"):
        tried = add_lora(model, lora).active_peft_config
    # Beside fused experts, peft takes gate_proj of a shared expert or a dense layer for the experts' own.
    if tried.target_parameters:
        lora.target_modules = tried.target_modules
    return lora


def check_lora(config: PreTrainedConfig, lora: Any, head: Head = "lm") -> None:
    """Try LoRA on the model's shape, without weights or memory.

    Raises:
        UserError: Targets that do not exist, with the linear layers that do, or an initialisation that goes wrong.
    """
    model = _shape_of(config, head)
    kinds = {type(module).__name__ for module in model.modules()}
    if not isinstance(lora.target_modules, str):
        paths = [name for name, _ in model.named_modules()]
        unknown = [
            target
            for target in sorted(lora.target_modules or [])
            if not any(path == target or path.endswith(f".{target}") for path in paths)
        ]
        if unknown:
            raise UserError(_unknown_targets(unknown, model, linear_layer_names(model)))
    with torch.device("meta"):
        if lora.init_lora_weights == "olora" and "Conv1D" in kinds:
            raise UserError(
                "model.lora.init_lora_weights: olora is not possible on Conv1D layers like GPT-2's: peft takes their "
                "inputs for outputs; take pissa"
            )
        add_lora(model, lora, head=head)


def _shape_of(config: PreTrainedConfig, head: Head) -> Any:
    with torch.device("meta"):
        return AUTO_CLASSES[head].from_config(copy.deepcopy(config))


def keep_trained_in_float32(model: torch.nn.Module) -> None:
    """Hold what is trained in float32 beside a frozen base of 16 bit; peft does so for adapters, not for the rest."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in own):
            is_norm = all(
                parameter.ndim < 2 for parameter in own
            )  # its weight and bias go together
            for parameter in own:
                if parameter.requires_grad or is_norm:
                    parameter.data = parameter.data.float()


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """List the last part of the name of every linear layer (GPT-2's Conv1D included) but the head."""
    return sorted({path.split(".")[-1] for path in linear_layers(model)})


def linear_layers(model: torch.nn.Module) -> list[str]:
    """List the path of every linear layer, quantized ones and GPT-2's Conv1D included, but the head's."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = (head, getattr(model, "score", None))
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module not in heads
    ]


def _unknown_targets(unknown: list[str], model: torch.nn.Module, names: list[str]) -> str:
    close = nearest(unknown[0], names) if len(unknown) == 1 else ""
    return (
        f"model.lora.target_modules: {unknown} are not in this {type(model).__name__}{close}; "
        f"its linear layers are named: {', '.join(names)}"
    )


def dense_copy(dequantized: Any, head: Head = "lm") -> PreTrainedModel:
    """Return a dequantized model as its class makes it: without traces of quantization, GPT-2's layers Conv1D again.

    Args:
        dequantized: What transformers' ``dequantize`` made, with a Linear for each layer that was quantized; its
            weights are taken over.
        head: The model's.
    """
    config = copy.deepcopy(dequantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        dense: Any = AUTO_CLASSES[head].from_config(config)
    weights = dequantized.state_dict()
    for path, module in dense.named_modules():
        was_linear = isinstance(module, Conv1D) and isinstance(
            dequantized.get_submodule(path), torch.nn.Linear
        )
        if was_linear:
            weights[f"{path}.weight"] = weights[f"{path}.weight"].T.contiguous()
    dense.load_state_dict(weights, assign=True)
    dense.tie_weights()
    if head == "lm":
        dense.generation_config = dequantized.generation_config
    return cast(PreTrainedModel, dense)


def changed_fields(lora: LoraConfig) -> dict[str, Any]:
    """Return the settings that are not peft's defaults, as a config holds them; ``r`` and ``lora_alpha`` always."""
    default = LoraConfig()
    names = [n for n in inspect.signature(LoraConfig).parameters if n not in PEFTS_OWN]
    values = {name: getattr(lora, name) for name in names}
    kept = {n: v for n, v in values.items() if n in ("r", "lora_alpha") or v != getattr(default, n)}
    return {n: sorted(v) if isinstance(v, set) else v for n, v in kept.items()}


def listed(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets or [])
