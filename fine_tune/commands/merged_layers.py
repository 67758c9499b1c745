"""Merge adapters layer by layer: no more of a model is in float32 at a time than one block of it."""

import copy
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from fine_tune.adapters import dense_copy
from fine_tune.models import Head

QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
Undo = Callable[[], None]


def merged_model(model: PeftModel, dtype: torch.dtype, head: Head) -> Any:
    """Merge every layer in float32 and keep it in ``dtype``; the adapted model is used up.

    Args:
        model: Its quantized layers are dequantized, what the adapter was trained on.
        dtype: Of all weights of the merged model.
        head: The model's.
    """
    quantized = any(_is_quantized(module) for module in model.modules())
    whole: Any = model
    for parent, name in list(_places_to_merge(whole.base_model.model)):
        setattr(parent, name, merged_layer(getattr(parent, name)).to(dtype))
    merged: Any = whole.merge_and_unload()  # the rest: config, what peft left on the model
    merged = dense_copy(merged, head) if quantized else merged
    return merged.to(dtype).eval()


@torch.no_grad()
def merged_layer(layer: Any) -> nn.Module:
    """Return a layer of peft's or bitsandbytes' as an ordinary one in float32, with the adapter merged into it."""
    if isinstance(layer, BaseTunerLayer) and _is_quantized(layer.get_base_layer()):
        layer = _adapter_on_dense(layer)
    elif _is_quantized(layer):
        return _dense(layer)
    layer = copy.deepcopy(layer).float()
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return layer.unload_and_optionally_merge_module(True, True, None)
    wrapper: Any = layer
    while hasattr(wrapper, "base_layer"):  # several parameters of one module are wrapped in turn
        wrapper.merge(safe_merge=True)
        wrapper = wrapper.base_layer
    merged: nn.Module = wrapper
    return merged


@contextmanager
def computing_merged(model: PeftModel) -> Iterator[None]:
    """Let the adapted model compute as the merged one does in float32."""

    def merge(root: nn.Module, skip: AbstractSet[nn.Module]) -> Undo:
        places = _places_to_merge(root, skip)
        before = [(parent, name, getattr(parent, name)) for parent, name in places]
        for parent, name, layer in before:
            setattr(parent, name, merged_layer(layer))
        undo_cast = _cast(root, skip, torch.float32)

        def undo() -> None:
            undo_cast()
            for parent, name, layer in before:
                setattr(parent, name, layer)

        return undo

    whole: Any = model
    with _changed_by_block(whole.base_model.model, merge):
        yield


@contextmanager
def computing_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model compute in ``dtype``, whatever the type of its weights; 4-bit weights are multiplied in it."""
    base = model.base_model.model if isinstance(model, PeftModel) else model
    with _changed_by_block(base, lambda root, skip: _cast(root, skip, dtype)):
        yield


@contextmanager
def _changed_by_block(
    model: Any, change: Callable[[nn.Module, AbstractSet[nn.Module]], Undo]
) -> Iterator[None]:
    """Change a block when it is computed and back afterwards; what is in no block, for the whole time."""
    blocks = _blocks(model, set(model._no_split_modules or []))
    undo_rest = change(model, {module for block in blocks for module in block.modules()})
    undos: dict[nn.Module, Undo] = {}

    def enter(block: nn.Module, _: Any) -> None:
        undos[block] = change(block, set())

    def leave(block: nn.Module, *_: Any) -> None:
        undos.pop(block, lambda: None)()

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        undo_rest()


def _blocks(model: nn.Module, names: set[str]) -> list[nn.Module]:
    if type(model).__name__ in names:
        return [model]
    return [block for child in model.children() for block in _blocks(child, names)]


def _places_to_merge(
    root: nn.Module, skip: AbstractSet[nn.Module] = frozenset()
) -> Iterator[tuple[nn.Module, str]]:
    """Give the parent and the name there of the outermost layers that peft or bitsandbytes made."""
    for name, child in root.named_children():
        if child in skip:
            continue
        if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper) or _is_quantized(child):
            yield root, name
        else:
            yield from _places_to_merge(child, skip)


def _cast(root: nn.Module, skip: AbstractSet[nn.Module], dtype: torch.dtype) -> Undo:
    before: list[tuple[Any, str, Any]] = []
    for module in root.modules():
        if module in skip:
            continue
        if _is_quantized(module) and hasattr(module, "compute_dtype"):
            before.append((module, "compute_dtype", module.compute_dtype))
            module.compute_dtype = dtype  # type: ignore[assignment]
        for parameter in module.parameters(recurse=False):
            plain = type(parameter) is nn.Parameter  # else it is packed
            if plain and parameter.is_floating_point() and parameter.dtype != dtype:
                before.append((parameter, "data", parameter.data))
                parameter.data = parameter.data.to(dtype)

    def undo() -> None:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

    return undo


def _adapter_on_dense(layer: Any) -> BaseTunerLayer:
    """Return an adapter's layer on the dequantized weights of its base."""
    name = layer.active_adapters[0]
    config = LoraConfig(
        r=layer.r[name],
        lora_alpha=layer.lora_alpha[name],
        use_dora=layer.use_dora[name],
        lora_bias=layer.lora_bias[name],
        target_modules=["layer"],
    )
    holder = nn.ModuleDict({"layer": _dense(layer.get_base_layer())})
    inject_adapter_in_model(config, holder, adapter_name=name)
    moved: Any = holder["layer"]
    adapter = {key: value for key, value in layer.state_dict().items() if "lora_" in key}
    unknown = moved.load_state_dict(adapter, strict=False).unexpected_keys
    assert not unknown, f"peft keeps {unknown} on a quantized layer only"
    moved.scaling = dict(layer.scaling)
    return moved


def _dense(layer: Any) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    if hasattr(
        layer.weight, "quant_state"
    ):  # in float32, as a forward pass, not in the type it was quantized from
        state = copy.copy(layer.weight.quant_state)
        state.dtype = torch.float32
        weight = dequantize_4bit(layer.weight.data, state)
    else:
        weight = dequantize_module_weight(layer).float()
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    return dense


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in QUANTIZED_LAYERS and not isinstance(module, BaseTunerLayer)
