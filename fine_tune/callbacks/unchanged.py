"""What a rehearsal may touch, put back bit for bit."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from fine_tune.errors import UserError
from fine_tune.shards import own_part


@contextmanager
def unchanged(pl_module: Any) -> Iterator[None]:
    """Put back all that training changes: weights, optimizer, gradients, metrics, precision, random numbers.

    Args:
        pl_module: A module about to train, or to go on; its weights must not change at all meanwhile.

    Raises:
        UserError: They did.
    """
    optimizer, modes = pl_module.trainer.optimizers[0], {m: m.training for m in pl_module.modules()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [_checksum(p) for p in trained]
    generators = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    goes_on = bool(optimizer.state)
    precision = dict(pl_module.trainer.precision_plugin.state_dict())
    try:
        yield
    finally:
        if not goes_on:
            optimizer.state.clear()
        optimizer.zero_grad(set_to_none=True)
        pl_module.metrics.reset()
        for module, training in modes.items():
            module.training = training
        if precision:
            pl_module.trainer.precision_plugin.load_state_dict(precision)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
    if weights != [_checksum(p) for p in trained]:
        name = type(optimizer).__name__
        if not all(torch.isfinite(own_part(p)).all() for p in trained):
            raise UserError(
                f"trainer.precision: under {pl_module.trainer.precision} {name} makes weights of 16 bit infinite or no "
                "number; take 16-mixed, bf16-mixed or bf16-true"
            )
        raise UserError(
            f"model.optimizer: {name} changes weights at learning rate 0 with zero gradients, so nothing can be "
            "rehearsed; set vram_guard.rehearse: false"
        )


def _checksum(parameter: torch.Tensor) -> tuple[int, ...]:
    """Tell apart two states of a tensor, without a copy of it in a wider type."""
    bits = own_part(parameter.detach()).contiguous().flatten().view(torch.uint8)
    if bits.device.type == "cpu":
        return (zlib.crc32(cast(Any, bits.numpy())),)
    return tuple(int(bits[start::7].sum(dtype=torch.int64)) for start in range(7))
