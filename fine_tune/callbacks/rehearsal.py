"""The worst step, validation, answers, a save and a reload, before the first step; then everything as it was."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer

from fine_tune.batches import cut_by_tokens, data_of, most_tokens_at_once, plan_of
from fine_tune.callbacks.checkpoints import Checkpoints
from fine_tune.callbacks.generations import BATCH_ROWS, Generations, prompt_and_answer
from fine_tune.callbacks.progress import format_seconds
from fine_tune.callbacks.unchanged import unchanged
from fine_tune.device_memory import HEADROOM, MEMORY_ERRORS, DeviceMemory, is_out_of_memory
from fine_tune.errors import UserError
from fine_tune.ranks import any_rank, from_all_ranks
from fine_tune.runs.checkpoint import LEFTOVERS
from fine_tune.runs.disk import format_bytes, free_bytes
from fine_tune.runs.run_folder import run_of
from fine_tune.shards import is_sharded

log = logging.getLogger("fine_tune")
GB = 1e9
FIRST_TIME_SECONDS = 2.0
FEW_TOKENS = 8  # written where memory is not what may run out
Cut = Callable[[int, str], None]  # to a budget, and why


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Args:
        lines: For the user: peak memory, disk, time.
        bytes_per_token: What forward and backward take for each padded token of a micro-batch.
    """

    lines: list[str]
    bytes_per_token: float


def circumstances(trainer: Trainer, pl_module: Any, memory: DeviceMemory) -> dict[str, Any]:
    """Return what decides how much memory a run takes: where any of it changes, it is rehearsed anew.

    Args:
        trainer: A trainer about to train.
        pl_module: Its module, weights loaded.
        memory: The device's.
    """
    data, plan, settings = data_of(trainer), plan_of(trainer), pl_module.model_settings
    return {
        "longest_row": dict(plan.longest_row),
        "batch_size": plan.batch_size,
        "eval_batch_size": data.eval_batch_size,
        "budget": plan.max_tokens_per_micro_batch,
        "device": f"{trainer.strategy.root_device.type} {memory.total()}",
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "dtype": settings.dtype,
        "quantization": settings.quantized,
        "attn_implementation": settings.attn_implementation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "offload_activations": pl_module.offload_activations,
        "compile": pl_module.is_compiled,
        "optimizer": type(trainer.optimizers[0]).__name__,
        "num_trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
    }


def rehearse(
    trainer: Trainer, pl_module: Any, memory: DeviceMemory, cut: Cut | None = None
) -> Rehearsed:
    """Run the worst of everything the run will do, and put all state back bit for bit.

    Args:
        trainer: A trainer about to train.
        pl_module: Its module, weights loaded.
        memory: The device's.
        cut: Cuts the budget, where the plan chose it; None where it is the user's own.

    Raises:
        UserError: One row alone does not fit, or the optimizer's state, or a checkpoint does not.
    """
    data, plan = data_of(trainer), plan_of(trainer)
    memory.reset_peak()
    with unchanged(pl_module):
        batch = _on_device(trainer, pl_module, data.longest_rows("train"))
        start = time.perf_counter()
        bytes_per_token = _worst_step(trainer, pl_module, batch, memory)
        step_seconds = time.perf_counter() - start
        if cut is not None:
            _leave_headroom(trainer, pl_module, batch, memory, cut, bytes_per_token)
        # The first time counts what libraries do once. All ranks time it again, or none: it waits for all.
        if any_rank(step_seconds < FIRST_TIME_SECONDS, pl_module.device, trainer.world_size):
            start = time.perf_counter()
            _gradients(trainer, pl_module, batch, memory)
            step_seconds = time.perf_counter() - start
        worst = memory.peak()
        if "validation" in plan.num_rows:
            _worst_validation(trainer, pl_module, data)
            _worst_answers(trainer, pl_module, data, memory)
            worst = max(worst, memory.peak())
        num_bytes, save_seconds = _save_and_reload(trainer)  # with the optimizer's state
    memory.clear_cache()
    total = memory.total()
    tokens = max(batch["lengths"]) * len(batch["lengths"])
    mean_tokens = plan.num_tokens["train"] / plan.steps_per_epoch / trainer.world_size
    left = step_seconds * min(1.0, mean_tokens / tokens) * (plan.num_steps - trainer.global_step)
    free = free_bytes(run_of(trainer).path)
    lines = [
        f"rehearsed: {len(batch['lengths'])} rows of up to {max(batch['lengths']):,} tokens; peak {worst / GB:.2f} GB "
        f"of {total / GB:.1f} GB ({100 * worst / total:.0f} %)",
        f"  a checkpoint has {num_bytes / GB:.3f} GB, saved and read back in {save_seconds:.1f} s; "
        f"{free / GB:.1f} GB of disk are free; roughly {format_seconds(left)} of steps to come",
    ]
    return Rehearsed([*lines, *_short_of_disk(trainer, num_bytes, free)], bytes_per_token)


def _short_of_disk(trainer: Trainer, num_bytes: int, free: int) -> list[str]:
    """Warn where the checkpoints kept at once, the last and the one being written among them, have no room."""
    plan, there = plan_of(trainer), len(run_of(trainer).read().get("checkpoints", []))
    keep = next(c.keep for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
    at_once = 2 + (keep if "validation" in plan.num_rows else 0)
    needed = min(at_once - there, plan.num_steps - trainer.global_step) * num_bytes
    if needed <= free:
        return []
    return [
        f"  WARNING: checkpoint.keep {keep} holds up to {at_once} checkpoints at once, the last and the one being "
        f"written among them: {format_bytes(needed)} more are needed, {format_bytes(free)} are free; free some, or set "
        "checkpoint.keep or trainer.default_root_dir"
    ]


def _worst_step(trainer: Trainer, pl_module: Any, batch: Any, memory: DeviceMemory) -> float:
    before, optimizer = memory.allocated(), trainer.optimizers[0]
    _gradients(trainer, pl_module, batch, memory)
    tokens = most_tokens_at_once(batch["lengths"], pl_module.max_tokens_per_micro_batch)
    bytes_per_token = (memory.peak() - before) / max(1, tokens)
    if not optimizer.state:  # else it is there already, and an update would change it
        _first_update(trainer, pl_module)
    return bytes_per_token


def _leave_headroom(
    trainer: Trainer, pl_module: Any, batch: Any, memory: DeviceMemory, cut: Cut, per_token: float
) -> None:
    """Cut the budget to the largest that leaves the headroom in the step and in the validation."""
    longest = max(batch["lengths"])
    per_row = (
        per_token * longest
    )  # with the gradient's share: too much, so that no first cut is too large
    tried: list[tuple[int, float]] = []  # rows at once, and the peak
    while True:
        peak, room = _peak_within(trainer, pl_module, batch, memory)
        rows = cut_by_tokens(batch["lengths"], pl_module.max_tokens_per_micro_batch)[0].stop
        of_ranks = from_all_ranks((peak - room, peak, room, rows, per_row), trainer.world_size)
        over, peak, room, rows, per_row = max(of_ranks)  # one cut for all
        if over <= 0:
            return
        taken = f"{peak / GB:.3g} GB where {room / GB:.3g} leave {HEADROOM:.0%} of the device free"
        why = f"rehearsed: {rows} rows of {longest:,} tokens at once take {taken}"
        if tried and rows >= tried[-1][0]:  # the guard allows no smaller budget, and has said so
            return
        if rows == 1 or (tried and peak >= tried[-1][1]):
            log.info("WARNING: %s; a smaller micro-batch would not", why)
            return
        if tried:
            per_row = (tried[-1][1] - peak) / (tried[-1][0] - rows)
        tried.append((rows, peak))
        cut(max(1, rows - math.ceil(over / max(per_row, 1.0))) * longest, why)


def _peak_within(
    trainer: Trainer, pl_module: Any, batch: Any, memory: DeviceMemory
) -> tuple[float, float]:
    """Return the peak of what the budget cuts, and what it may be: the device less headroom and other processes."""
    memory.clear_cache()
    memory.reset_peak()
    others = memory.used() - memory.reserved()
    _gradients(trainer, pl_module, batch, memory)
    if "validation" in plan_of(trainer).num_rows:
        in_training = [module for module in pl_module.modules() if module.training]
        _worst_validation(trainer, pl_module, data_of(trainer))
        for module in in_training:
            module.training = True
    return memory.peak(), (1 - HEADROOM) * memory.total() - others


def _gradients(trainer: Trainer, pl_module: Any, batch: Any, memory: DeviceMemory) -> None:
    while True:
        with trainer.precision_plugin.train_step_context():
            failure = pl_module.gradients(batch).failure
        if failure is None or failure.kind == "non_finite":
            return  # a scaler that still has to find its scale is no matter of memory
        pl_module.handle(failure)
        memory.reset_peak()


def _first_update(trainer: Trainer, pl_module: Any) -> None:
    """Let the optimizer allocate its state; zero gradients at rate zero leave the weights as they are."""
    optimizer, out_of_memory = trainer.optimizers[0], False
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    if not any_rank(out_of_memory, pl_module.device, trainer.world_size):
        return
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    raise UserError(
        f"model.optimizer: the state of {type(optimizer).__name__} for {trained:,} trained weights does not fit the "
        "device (rehearsed before the first step, nothing has changed); take an 8-bit or paged optimizer "
        "(--model.optimizer bitsandbytes.optim.PagedAdamW8bit), or train fewer weights: --model.lora auto, or a "
        "smaller model"
    )


def _worst_validation(trainer: Trainer, pl_module: Any, data: Any) -> None:
    batch = _on_device(trainer, pl_module, data.longest_rows("validation"))
    pl_module.eval()
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        pl_module.validation_step(batch, 0)


def _worst_answers(trainer: Trainer, pl_module: Any, data: Any, memory: DeviceMemory) -> None:
    asked = next((c for c in trainer.callbacks if isinstance(c, Generations)), None)  # type: ignore[attr-defined]
    if asked is None or not asked.asks(trainer, pl_module):
        return
    if not trainer.is_global_zero and not is_sharded(pl_module.model):
        return
    rows = data.rows("validation")
    prompts = [prompt_and_answer(row)[0] for row in rows.select(range(min(asked.rows, len(rows))))]
    longest = max(prompts, key=len)
    tokens = asked.max_new_tokens
    if not memory.can_run_out:
        tokens = min(tokens, FEW_TOKENS)
    pl_module.generate([longest] * min(len(prompts), BATCH_ROWS), tokens, [])


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
