"""Adapters and weights in folders: held against what is trained, and put back into a model of the same kind."""

import json
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

from fine_tune.adapters import INITS_THAT_CHANGE_THE_BASE, listed
from fine_tune.errors import UserError

SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def saved_lora(folder: str | Path) -> LoraConfig:
    """Read the settings of the adapter in a folder, as ones to train on with."""
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.base_model_name_or_path = None
    return lora


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
    targets = [listed(of.target_modules) for of in (saved, lora)]
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
