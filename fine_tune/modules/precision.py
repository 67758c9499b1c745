"""The types of weights and arithmetic by the trainer's precision, and leaving it in the middle of a run."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision_dtype(precision: str) -> torch.dtype | None:
    """Return the 16-bit type of a trainer's precision, or None for 32 bit."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else None


def weights_dtype(asked: str, precision: str, *, frozen: bool) -> torch.dtype:
    """Return the type of the weights in memory.

    Args:
        asked: ``auto`` or a name of a type.
        precision: The trainer's.
        frozen: Whether the base is frozen (LoRA); trained weights stay in float32 under mixed precision, where an
            update of 16 bit would be lost in rounding.
    """
    if asked != "auto":
        return DTYPES[asked]
    if not frozen and precision.endswith("mixed"):
        return torch.float32
    return precision_dtype(precision) or torch.float32


def lowered(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in another precision than the trainer's.

    Args:
        precision: ``bf16-mixed``, ``32-true``, or None for the trainer's own.
        device: Where.
    """
    if precision is None:
        return nullcontext()
    if precision == "32-true":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=precision_dtype(precision), cache_enabled=False)


def follow_precision(model: torch.nn.Module, precision: str) -> None:
    """Let a model loaded for 16 bit compute in a wider precision: 16-bit weights become float32, which loses nothing.

    Weights in 4 bit stay as they are; the type they are multiplied in follows.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = precision_dtype(precision) or torch.float32  # type: ignore[assignment]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
