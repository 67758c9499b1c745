"""The LM head, run only where a token is predicted that counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def head_at(model: Any, positions_N: Tensor) -> Iterator[None]:
    """Run the LM head only at these positions of the flattened ``[B * T]`` hidden states.

    The model's logits then have shape ``[1, N, V]``; whatever it does to them after the head is elementwise and stays.
    """

    def gather(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        return (hidden_BTD.flatten(0, 1)[positions_N].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
