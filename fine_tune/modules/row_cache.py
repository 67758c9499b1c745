"""Keys and values of answers that are being written: rows come and go, new columns are written in place.

Rows end at the same column; shorter ones are padded on the left.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MORE_COLUMNS = 32  # made at a time


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, with room for columns to come: ``torch.cat`` would copy all of them at every token."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new columns and return all of them."""
        before, new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._room is None or self._room[0].shape[-2] < before + new:
            olds = (self.keys, self.values) if before else (None, None)
            keys, values = (
                _with_room(old, states, before + new + MORE_COLUMNS)
                for old, states in zip(olds, (key_states, value_states), strict=True)
            )
            self._room = (keys, values)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before : before + new] = states
        self.keys, self.values = (room[:, :, : before + new] for room in self._room)
        return self.keys, self.values

    def keep(self, rows: Tensor, start: int) -> None:
        """Keep these rows, from a column on."""
        keys, values = self._both()
        self.keys, self.values = keys[rows, :, start:], values[rows, :, start:]
        self._room = None

    def add(self, other: "GrowingLayer") -> None:
        """Add the rows of another cache's layer below."""
        pairs = zip(self._both(), other._both(), strict=True)
        self.keys, self.values = (_below(first, second) for first, second in pairs)
        self._room = None

    def _both(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "columns were written"
        return self.keys, self.values


class RowCache(DynamicCache):
    """The cache of a model whose layers all attend to what stands before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer

    def keep(self, rows: Tensor, start: int) -> None:
        """Keep these rows, from a column on: what stands before it is padding of all of them."""
        for layer in self.layers:
            assert isinstance(layer, GrowingLayer)
            layer.keep(rows, start)

    def add(self, other: "RowCache") -> None:
        """Add the rows of another cache below, aligned at their ends."""
        for layer, of_other in zip(self.layers, other.layers, strict=True):
            assert isinstance(layer, GrowingLayer) and isinstance(of_other, GrowingLayer)
            layer.add(of_other)


def can_keep_rows(config: PreTrainedConfig) -> bool:
    """Say whether the state of a model is keys and values alone: no state-space or linear attention."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _with_room(old: Tensor | None, states: Tensor, columns: int) -> Tensor:
    shape = [*states.shape[:-2], columns, states.shape[-1]]
    room = states.new_empty(shape)
    if old is not None:
        room[:, :, : old.shape[-2]] = old
    return room


def _below(first: Tensor, second: Tensor) -> Tensor:
    columns = max(first.shape[-2], second.shape[-2])
    padded = [torch.nn.functional.pad(t, (0, 0, columns - t.shape[-2], 0)) for t in (first, second)]
    return torch.cat(padded)
