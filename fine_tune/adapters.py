"""LoRA adapters, and putting a checkpoint's weights back into a model of the same kind."""

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    replace_lora_weights_loftq,
    set_peft_model_state_dict,
)
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fine_tune.errors import UserError, nearest
from fine_tune.models import AUTO_CLASSES, Head

# What peft changes of the base when it makes the adapter, it changes again when it opens the saved one.
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora")
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
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
        raise UserError(_unknown_targets(_listed(lora.target_modules), model, names)) from error
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


def saved_lora(folder: str | Path) -> LoraConfig:
    """Read the settings of the adapter in a folder, as ones to train on with."""
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.base_model_name_or_path = None
    return lora


def changed_fields(lora: LoraConfig) -> dict[str, Any]:
    """Return the settings that are not peft's defaults, as a config holds them; ``r`` and ``lora_alpha`` always."""
    default = LoraConfig()
    names = [n for n in inspect.signature(LoraConfig).parameters if n not in PEFTS_OWN]
    values = {name: getattr(lora, name) for name in names}
    kept = {n: v for n, v in values.items() if n in ("r", "lora_alpha") or v != getattr(default, n)}
    return {n: sorted(v) if isinstance(v, set) else v for n, v in kept.items()}


def other_shape(lora: Any, folder: str | Path) -> str | None:
    """Say in what LoRA settings differ from those of the adapter in a folder, if their weights do not fit.

    Args:
        lora: The settings, or ``auto``: those of the folder.
        folder: Holds the adapter.
    """
    saved = saved_lora(folder)
    if saved.init_lora_weights in INITS_THAT_CHANGE_THE_BASE:
        return f"init_lora_weights {saved.init_lora_weights!r}, which changed its base"
    if lora == "auto":
        return None
    for field in SHAPE:
        if getattr(saved, field) != getattr(lora, field):
            return (
                f"{field} {getattr(saved, field)!r}, and the config gives {getattr(lora, field)!r}"
            )
    targets = [_listed(of.target_modules) for of in (saved, lora)]
    if lora.target_modules is not None and targets[0] != targets[1]:
        return f"target_modules {targets[0]}, and the config gives {targets[1]}"
    return None


def go_on_with_adapter(model: Any, folder: Path) -> None:
    """Put the weights of a folder's adapter into a model's, of the same shape; a new scalar head stays as it is.

    Raises:
        UserError: One of them has weights that the other lacks.
    """
    saved = load_peft_weights(str(folder), device="cpu")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    new_head = {name: value for name, value in wanted.items() if name.endswith(".score.weight")}
    saved = {**new_head, **saved}
    if saved.keys() != wanted.keys():
        different = sorted(saved.keys() ^ wanted.keys())
        raise UserError(
            f"model.lora: the adapter in '{folder}' has other weights than the config's (first: {different[0]}); "
            "set model.lora: auto, which takes its settings over"
        )
    set_peft_model_state_dict(model, saved)


def restore_weights(model: Any, folder: Path, *, same_base: bool = False) -> None:
    """Copy the weights of a checkpoint folder into a model of the same kind, bit for bit.

    Args:
        model: A Hugging Face model, or a peft model around one.
        folder: The checkpoint's.
        same_base: Whether an adapter's base is known to be the one it was trained on, whatever its folder is called.

    Raises:
        UserError: The folder holds other weights than the model: full instead of adapter, another base, rank or
            shape.
    """
    check_kind(folder, trains_adapter=isinstance(model, PeftModel))
    if isinstance(model, PeftModel):
        _restore_adapter(model, folder, same_base)
    else:
        saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        model.load_state_dict(
            saved.state_dict(), assign=on_cpu
        )  # taken over where nothing is moved
        model.tie_weights()


def _listed(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets or [])


def check_kind(folder: Path, *, trains_adapter: bool) -> None:
    """Hold what a checkpoint holds against what is trained.

    Raises:
        UserError: Full weights instead of an adapter, or the other way round.
    """
    has_adapter = (folder / "adapter_config.json").is_file()
    if trains_adapter != has_adapter:
        kinds = ("an adapter", "full weights") if has_adapter else ("full weights", "an adapter")
        raise UserError(
            f"ckpt_path: '{folder}' holds {kinds[0]}, but the config trains {kinds[1]} (model.lora)"
        )


def _restore_adapter(model: Any, folder: Path, same_base: bool) -> None:
    saved = json.loads((folder / "adapter_config.json").read_text())
    now = model.active_peft_config
    fields = list(SHAPE)
    if not same_base:
        fields.insert(0, "base_model_name_or_path")
    inits = (saved.get("init_lora_weights"), now.init_lora_weights)
    if any(init in INITS_THAT_CHANGE_THE_BASE for init in inits):
        fields.append("init_lora_weights")
    for field in fields:
        if saved.get(field) != getattr(now, field):
            raise UserError(
                f"ckpt_path: the adapter in '{folder}' has {field} {saved.get(field)!r}, the config gives "
                f"{getattr(now, field)!r}; an adapter fits only the base and shape it was trained with"
            )
    weights = load_peft_weights(str(folder), device="cpu")
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if wanted != set(weights):
        different = sorted(wanted ^ set(weights))
        raise UserError(
            f"ckpt_path: the adapter in '{folder}' has other layers than the config's (first: {different[0]})"
        )
    set_peft_model_state_dict(model, weights)
