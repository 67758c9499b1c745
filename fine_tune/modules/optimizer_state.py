"""How many bytes an optimizer's state will have, before there are weights."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fine_tune.modules.optimization import build_optimizer

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule

WITH_VALUES = "bitsandbytes"  # its optimizers make tables of values before they start
TRIED = (2**16, 2**17)  # weights; from such sizes on its state grows by the weight


def bytes_of_state(module: "StepModule", trained: list[nn.Parameter]) -> int:
    """Return the bytes of the module's optimizer's state after a step.

    Args:
        module: Says which optimizer.
        trained: The weights, without values, inside ``memory.without_values``.
    """
    named = [(str(i), parameter) for i, parameter in enumerate(trained)]
    with unset_fake_temporarily():
        if _built(module, [nn.Parameter(torch.empty(1))]).__module__.startswith(WITH_VALUES):
            return _from_small_ones(module, Counter((p.numel(), p.dtype) for p in trained))
    optimizer = build_optimizer(module.optimizer, named, None)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return sum(_by_place(optimizer.state.values()).values())


def _from_small_ones(module: "StepModule", sizes: Counter[tuple[int, torch.dtype]]) -> int:
    small = {size for size in sizes if size[0] < TRIED[0]}
    large = {dtype for _, dtype in sizes.keys() - small}
    probes = {(tried, dtype) for _, dtype in sizes for tried in TRIED}
    tried = sorted(small | probes, key=str)
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in tried]
    optimizer = _built(module, parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    places = [_by_place([optimizer.state[parameter]]) for parameter in parameters]
    times = Counter(place for of_one in places for place in of_one)
    used = [
        of_one
        for size, of_one in zip(tried, places, strict=True)
        if size in small or size[1] in large
    ]
    shared = {k: v for of_one in used for k, v in of_one.items() if times[k] > 1}
    own = {
        size: sum(v for k, v in of_one.items() if k not in shared)
        for size, of_one in zip(tried, places, strict=True)
    }
    total = sum(shared.values())
    for (size, dtype), count in sizes.items():
        if (size, dtype) in small:
            total += count * own[(size, dtype)]
        else:
            low, high = (own[(tried_size, dtype)] for tried_size in TRIED)
            total += count * round(low + (size - TRIED[0]) * (high - low) / (TRIED[1] - TRIED[0]))
    return total


def _built(module: "StepModule", parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    return build_optimizer(module.optimizer, named, None)


def _by_place(states: Any) -> dict[int, int]:
    tensors = (v for state in states for v in state.values() if isinstance(v, Tensor))
    places = (tensor.untyped_storage() for tensor in tensors)
    return {place._cdata: place.nbytes() for place in places}
