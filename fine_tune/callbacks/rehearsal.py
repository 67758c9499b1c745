"""The worst step, validation, answers, a save and a reload, before the first step; then everything as it was."""

import logging
import random
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer

from fine_tune.batches import data_of, most_tokens_at_once, plan_of
from fine_tune.callbacks.generations import BATCH_ROWS, Generations, prompt_and_answer
from fine_tune.callbacks.progress import format_seconds
from fine_tune.device_memory import DeviceMemory
from fine_tune.errors import UserError
from fine_tune.ranks import any_rank
from fine_tune.runs.checkpoint import LEFTOVERS
from fine_tune.runs.run_folder import run_of

log = logging.getLogger("fine_tune")
GB = 1e9
FIRST_TIME_SECONDS = 2.0


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Args:
        lines: For the user: peak memory, disk, time.
        bytes_per_token: What forward and backward take for each padded token of a micro-batch.
    """

    lines: list[str]
    bytes_per_token: float


def rehearse(trainer: Trainer, pl_module: Any, memory: DeviceMemory) -> Rehearsed:
    """Run the worst of everything the run will do, and put all state back bit for bit.

    Args:
        trainer: A trainer about to train.
        pl_module: Its module, weights loaded.
        memory: The device's.

    Raises:
        UserError: One row alone does not fit, or a checkpoint does not.
    """
    data, plan = data_of(trainer), plan_of(trainer)
    memory.reset_peak()
    with _unchanged(pl_module):
        batch = _on_device(trainer, pl_module, data.longest_rows("train"))
        start = time.perf_counter()
        bytes_per_token = _worst_step(trainer, pl_module, batch, memory)
        step_seconds = time.perf_counter() - start
        # The first time counts what libraries do once. All ranks time it again, or none: it waits for all.
        if any_rank(step_seconds < FIRST_TIME_SECONDS, pl_module.device, trainer.world_size):
            start = time.perf_counter()
            with trainer.precision_plugin.train_step_context():
                pl_module.gradients(batch)
            step_seconds = time.perf_counter() - start
        peaks = {"step": memory.peak()}
        if "validation" in plan.num_rows:
            _worst_validation(trainer, pl_module, data)
            peaks["validation"] = memory.peak()
            _worst_answers(trainer, pl_module, data)
            peaks["answers"] = memory.peak()
    num_bytes, save_seconds = _save_and_reload(trainer)
    memory.clear_cache()
    total = memory.total()
    worst = max(peaks.values())
    free = shutil.disk_usage(run_of(trainer).path).free
    tokens = max(batch["lengths"]) * len(batch["lengths"])
    mean_tokens = plan.num_tokens["train"] / plan.steps_per_epoch / trainer.world_size
    left = step_seconds * min(1.0, mean_tokens / tokens) * (plan.num_steps - trainer.global_step)
    lines = [
        f"rehearsed: {len(batch['lengths'])} rows of up to {max(batch['lengths']):,} tokens; peak {worst / GB:.2f} GB "
        f"of {total / GB:.1f} GB ({100 * worst / total:.0f} %)",
        f"  a checkpoint has {num_bytes / GB:.3f} GB, saved and read back in {save_seconds:.1f} s; "
        f"{free / GB:.1f} GB of disk are free; roughly {format_seconds(left)} of steps to come",
    ]
    return Rehearsed(lines, bytes_per_token)


def _worst_step(trainer: Trainer, pl_module: Any, batch: Any, memory: DeviceMemory) -> float:
    optimizer, before = trainer.optimizers[0], memory.allocated()
    while True:
        with trainer.precision_plugin.train_step_context():
            failure = pl_module.gradients(batch).failure
        if failure is None or failure.kind == "non_finite":
            break  # a scaler that still has to find its scale is no matter of memory
        pl_module.handle(failure)
        memory.reset_peak()
    tokens = most_tokens_at_once(batch["lengths"], pl_module.max_tokens_per_micro_batch)
    bytes_per_token = (memory.peak() - before) / max(1, tokens)
    if optimizer.state:
        return bytes_per_token  # of a run that goes on: its state is there already, and an update would change it
    # The update allocates the optimizer's state; zero gradients at rate zero leave the weights as they are.
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return bytes_per_token


def _worst_validation(trainer: Trainer, pl_module: Any, data: Any) -> None:
    batch = _on_device(trainer, pl_module, data.longest_rows("validation"))
    pl_module.eval()
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        pl_module.validation_step(batch, 0)


def _worst_answers(trainer: Trainer, pl_module: Any, data: Any) -> None:
    asked = next((c for c in trainer.callbacks if isinstance(c, Generations)), None)  # type: ignore[attr-defined]
    if asked is None or not asked.asks(trainer, pl_module) or not trainer.is_global_zero:
        return
    rows = data.rows("validation")
    prompts = [prompt_and_answer(row)[0] for row in rows.select(range(min(asked.rows, len(rows))))]
    longest = max(prompts, key=len)
    pl_module.generate([longest] * min(len(prompts), BATCH_ROWS), min(asked.max_new_tokens, 8), [])


def _save_and_reload(trainer: Trainer) -> tuple[int, float]:
    folder = run_of(trainer).checkpoints / f".rehearsal.{LEFTOVERS[0]}"
    start = time.perf_counter()
    trainer.save_checkpoint(str(folder))
    num_bytes = 0
    if trainer.is_global_zero:
        trainer.strategy.checkpoint_io.load_checkpoint(str(folder))
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        trainer.strategy.checkpoint_io.remove_checkpoint(str(folder))
    trainer.strategy.barrier("rehearsal")
    return num_bytes, time.perf_counter() - start


def _on_device(trainer: Trainer, pl_module: Any, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(batch, device=pl_module.device)


@contextmanager
def _unchanged(pl_module: Any) -> Iterator[None]:
    optimizer, modes = pl_module.trainer.optimizers[0], {m: m.training for m in pl_module.modules()}
    weights = [_checksum(p) for p in pl_module.parameters() if p.requires_grad]
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
    trained = [p for p in pl_module.parameters() if p.requires_grad]
    if weights != [_checksum(p) for p in trained]:
        name = type(optimizer).__name__
        if not all(torch.isfinite(p).all() for p in trained):
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
    bits = parameter.detach().contiguous().flatten().view(torch.uint8)
    if bits.device.type == "cpu":
        return (zlib.crc32(cast(Any, bits.numpy())),)
    return tuple(int(bits[start::7].sum(dtype=torch.int64)) for start in range(7))
