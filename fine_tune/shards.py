"""Tensors that lie in parts on several devices (torch's DTensor): this rank's part, the whole, and back."""

from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, distribute_tensor


def shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Cut a model's weights over the ranks of a mesh: one block at a time is whole while it computes (FSDP2).

    Args:
        model: Its weights whole, the same on every rank.
        blocks: Of the model; what lies outside them is one more.
        mesh: Of one dimension.
    """
    for block in [*blocks, model]:
        sharded: Any = fully_shard(block, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)  # the step divides once, by its own count
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(model: Any) -> bool:
    """Whether all ranks take its forward and backward passes together."""
    return isinstance(model, FSDPModule)


def own_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this rank: all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; to be asked for on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any, *, keep: bool) -> Any:
    """Return nested dicts and lists with whole tensors on the host, one after the other; on every rank.

    Args:
        state: Some of its tensors sharded; those that share memory share it in the answer.
        keep: Whether this rank wants them; else they are empty.
    """
    seen: dict[int, Tensor] = {}

    def gathered(tensor: DTensor) -> Tensor:
        place = tensor.to_local().data_ptr()
        if place not in seen or tensor.to_local().numel() == 0:
            full = tensor.full_tensor()
            seen[place] = full.cpu() if keep else full.new_empty(0)
        return seen[place]

    return apply_to_collection(state, DTensor, gathered)


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a whole tensor as another one is cut; every rank has all of it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    on_device = tensor.to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def sharded_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Cut an optimizer's saved state as its parameters are cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))
    cut = {
        number: {
            name: sharded_like(value, of_number[number]) if isinstance(value, Tensor) else value
            for name, value in of_parameter.items()
        }
        for number, of_parameter in state["state"].items()
    }
    return {**state, "state": cut}
