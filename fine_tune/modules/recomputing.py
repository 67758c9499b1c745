"""What of a forward pass is kept for the backward pass: all, some, the blocks' inputs only, or all on the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recomputing = bool | Literal["auto", "selective"]
LEAST_MOVED = 2**16  # bytes; smaller tensors stay where they are

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default}
_ATTENTION = (
    "aten::_scaled_dot_product",  # every kernel behind it
    "torch_attn::_varlen_attn",
    "flex_attention",
)


def recompute(model: Any, how: Recomputing) -> None:
    """Let a model recompute its activations in the backward pass.

    Args:
        model: A model of transformers, before adapters are added.
        how: True keeps the inputs of its blocks only; ``selective`` also what attention and every second matrix product
            gave; False changes nothing.
    """
    if how is False:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = selective_contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def selective_contexts() -> tuple[Any, Any]:
    """Return the contexts of one block's forward pass and of its repetition, as torch's ``checkpoint`` asks for."""
    counts = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = False
        if operation in _PRODUCTS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        elif str(getattr(operation, "name", lambda: "")()).startswith(_ATTENTION):
            keep = True
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextmanager
def kept_on_host(model: nn.Module, *, active: bool) -> Iterator[None]:
    """Keep what the backward pass needs in the host's memory, and bring it back when it is needed; exact, slower.

    Args:
        model: Whose weights stay where they are.
        active: False changes nothing.
    """
    if not active:
        yield
        return
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def move(tensor: Tensor) -> tuple[torch.device, Tensor]:
        is_weight = tensor.untyped_storage().data_ptr() in weights
        if is_weight or tensor.nbytes < LEAST_MOVED:
            return tensor.device, tensor
        on_gpu = tensor.device.type == "cuda"
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=on_gpu)
        host.copy_(tensor, non_blocking=on_gpu)
        return tensor.device, host

    def bring_back(moved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = moved
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(move, bring_back):
        yield
