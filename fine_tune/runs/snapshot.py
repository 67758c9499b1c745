"""A copy of the training state in host memory, taken between two steps: the next step cannot change it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copy a state into memory that is kept from one copy to the next.

    Fresh memory costs many times the copy itself (measured: 400 MB in 1.3 s, into kept memory in 0.02 s).
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []

    def take(self, state: Any) -> Any:
        """Return a deep copy on the host; tensors that share memory share it in the copy, too.

        What the previous call returned is overwritten.
        """
        free: dict[Any, list[Tensor]] = {}
        for tensor in self._taken:
            free.setdefault(_form(tensor), []).append(tensor)
        self._taken = []
        copies: dict[Any, Tensor] = {}
        memo: dict[int, Any] = {}  # what deepcopy takes for already copied
        from_device = False
        for tensor in tensors_in(state):
            place = (tensor.device, tensor.data_ptr(), _form(tensor))
            if place not in copies:
                copies[place] = self._copy(tensor, free)
                from_device |= tensor.is_cuda
            memo[id(tensor)] = copies[place]
        if from_device:
            torch.cuda.synchronize()
        return copy.deepcopy(state, memo)

    @property
    def held_bytes(self) -> int:
        """Memory kept for the next copy."""
        return sum(tensor.nbytes for tensor in self._taken)

    def release(self) -> None:
        """Give the memory back."""
        self._taken = []

    def _copy(self, tensor: Tensor, free: dict[Any, list[Tensor]]) -> Tensor:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return tensor.detach().clone().cpu()
        kept = free.get(_form(tensor))
        target = kept.pop() if kept else _host_memory_like(tensor)
        target.copy_(tensor.detach(), non_blocking=True)
        self._taken.append(target)
        return target


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Find the tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def bytes_of(state: Any) -> int:
    """Return the bytes its tensors need; those that share memory count once."""
    sizes = {(t.device, t.data_ptr(), _form(t)): t.nbytes for t in tensors_in(state)}
    return sum(sizes.values())


def _form(tensor: Tensor) -> Any:
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def _host_memory_like(tensor: Tensor) -> Tensor:
    """Pinned for a tensor on a GPU, so that the copy runs at full speed."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda
    )
