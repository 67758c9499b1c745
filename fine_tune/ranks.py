"""What the processes of a run tell one another: sums of counts and gradients, and whether one of them failed."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory

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
) -> bool:
    """Sum the gradients of all processes, in place.

    A parameter that has a gradient on any process gets one on all; one that has none anywhere keeps none, so that the
    optimizer leaves it alone, as it would with one process.

    Returns:
        False where a process has no memory for it, and then for all of them: nothing has been summed.
    """
    if world_size == 1:
        return True
    has_gradient = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=device
    )
    torch.distributed.all_reduce(has_gradient)
    touched = [p for p, ranks in zip(parameters, has_gradient.tolist(), strict=True) if ranks]
    out_of_memory = False
    try:  # all that is allocated, before a process waits for another
        for parameter in touched:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        buckets = _buckets([p.grad for p in touched if p.grad is not None])
        rooms = _rooms(buckets)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    if any_rank(out_of_memory, device, world_size):
        return False
    for bucket in buckets:
        sizes = [gradient.numel() for gradient in bucket]
        flat = rooms[bucket[0].dtype][: sum(sizes)]
        parts = flat.split(sizes)
        for gradient, part in zip(bucket, parts, strict=True):
            part.view_as(gradient).copy_(gradient)
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    return True


def _rooms(buckets: list[list[Tensor]]) -> dict[torch.dtype, Tensor]:
    # one for each type, which its largest bucket fills
    sizes: dict[torch.dtype, int] = {}
    for bucket in buckets:
        dtype, numel = bucket[0].dtype, sum(gradient.numel() for gradient in bucket)
        sizes[dtype] = max(numel, sizes.get(dtype, 0))
    device = buckets[0][0].device if buckets else None
    return {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}


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
