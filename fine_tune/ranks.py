"""What the processes of a run tell one another: sums of counts and gradients, and whether one of them failed."""

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(value: Tensor, device: torch.device, world_size: int) -> Tensor:
    """Return the sum of a tensor over all processes; with one process, the tensor itself."""
    if world_size == 1:
        return value
    value = value.to(device)
    torch.distributed.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device, world_size: int) -> bool:
    """Whether the flag is set in any process."""
    if world_size == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag)), device, world_size).item())


def from_all_ranks(value: T, world_size: int) -> list[T]:
    """Return what each process holds."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def sum_gradients_over_ranks(
    parameters: list[torch.nn.Parameter], device: torch.device, world_size: int
) -> None:
    """Sum the gradients of all processes, in place.

    A parameter that has a gradient on any process gets one on all; one that has none anywhere keeps none, so that the
    optimizer leaves it alone, as it would with one process.
    """
    if world_size == 1:
        return
    has_gradient = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=device
    )
    torch.distributed.all_reduce(has_gradient)
    touched = [p for p, ranks in zip(parameters, has_gradient.tolist(), strict=True) if ranks]
    for parameter in touched:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in touched if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: list[Tensor], max_numel: int = 2**25) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    numel, dtype = max_numel + 1, None
    for tensor in tensors:
        if numel + tensor.numel() > max_numel or tensor.dtype != dtype:
            buckets.append([])
            numel, dtype = 0, tensor.dtype
        buckets[-1].append(tensor)
        numel += tensor.numel()
    return buckets
