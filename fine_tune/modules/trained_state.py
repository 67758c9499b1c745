"""A copy of all that one optimizer step changes, to take the step again from where it began."""

import copy
from typing import Any

import torch


class TrainedState:
    """Trained weights and the optimizer's state, copied to the host.

    Args:
        optimizer: The optimizer, before its step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._weights = [p.detach().to("cpu", copy=True) for p in self._parameters]
        self._states = {
            p: _copied(optimizer.state[p]) for p in self._parameters if p in optimizer.state
        }

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, self._weights, strict=True):
                parameter.copy_(weight)
        for parameter in self._parameters:
            now = self._optimizer.state.pop(parameter, None)
            before = self._states.get(parameter)
            if before is not None:
                self._optimizer.state[parameter] = _put_back(before, now or {})


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True)
        if isinstance(value, torch.Tensor)
        else copy.deepcopy(value)
        for name, value in state.items()
    }


def _put_back(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    # into the tensors there are: paged optimizers hold theirs in memory of a special kind
    state = dict(now)
    for name, value in before.items():
        held = now.get(name)
        if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
            held.copy_(value)
        else:
            state[name] = copy.deepcopy(value)
    return state
