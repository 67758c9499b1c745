"""Settings the user left to the memory there is: as many rows at once as fit, recomputing only where it must be."""

from typing import Any

import torch

from fine_tune.batches import Choice
from fine_tune.device_memory import HEADROOM, DeviceMemory, memory_of
from fine_tune.modules.memory_plan import CUDA_CONTEXT, MemoryPlanner
from fine_tune.modules.memory_ways import Fitting, largest_budget, largest_rows, way_as_set
from fine_tune.modules.recomputing import Recomputing

GIB = 2**30
BUDGET, RECOMPUTING = "data.max_tokens_per_micro_batch", "model.gradient_checkpointing"


def choose_by_memory(model: Any, data: Any, precision: str) -> dict[str, Choice]:
    """Choose what was left to ``auto``; the rehearsal before the first step shows whether it is right.

    Args:
        model: The module, built and checked.
        data: Its data module, prepared.
        precision: The trainer's.

    Returns:
        A value and a reason for each key that was left open so; it is written into both.
    """
    open_keys = [RECOMPUTING] if model.model_settings.gradient_checkpointing == "auto" else []
    open_keys += [BUDGET] if data.fills_memory else []
    if not open_keys:
        return {}
    data.setup("fit")
    data.teardown("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = memory_of(device)
    room = room_on(memory, on_gpu=device.type == "cuda")
    planner = MemoryPlanner(model, data.tokenizer, precision, memory.total())
    batch = data.longest_rows("train")
    found = _first_that_fits(model, data, planner, batch, room)
    recomputed, rows, used = found
    reason = (
        f"{used / GIB:.2f} of {room / GIB:.2f} GiB with {rows} rows of {batch['lengths'][0]:,} tokens"
        if used <= room
        else f"one row takes {used / GIB:.2f} GiB, {room / GIB:.2f} are there: the rehearsal decides"
    )
    budget = rows * batch["lengths"][0]
    if device.type == "cpu":
        budget = min(budget, max(data.cpu_limit(), batch["lengths"][0]))
    values = {RECOMPUTING: recomputed, BUDGET: budget}
    chosen = {key: Choice(values[key], reason) for key in open_keys}
    model.model_settings.gradient_checkpointing = recomputed
    if BUDGET in chosen:
        data.max_tokens_per_micro_batch = budget
    return chosen


def room_on(memory: DeviceMemory, *, on_gpu: bool) -> float:
    """Return the bytes a run may take: what is free, less the headroom and, on a GPU, the driver's."""
    free = memory.total() - memory.used()
    return free - HEADROOM * memory.total() - (CUDA_CONTEXT if on_gpu else 0)


def _first_that_fits(
    model: Any, data: Any, planner: MemoryPlanner, batch: Any, room: float
) -> tuple[Recomputing, int, int]:
    """Return what of the activations is recomputed, the rows at once, and the bytes they take."""
    asked = model.model_settings.gradient_checkpointing
    recomputed: Recomputing
    for recomputed in (False, True) if asked == "auto" else (asked or False,):
        way = way_as_set(model.model_settings, recomputed=recomputed)
        if data.fills_memory:
            fitting: Fitting | None = largest_budget(planner, way, batch, room)
            if fitting is not None:
                return recomputed, fitting.rows, fitting.memory.total
        rows = 1
        if not data.fills_memory:
            rows = largest_rows(batch["lengths"], data.plan.max_tokens_per_micro_batch)
        used = planner.at_once(way.settings, batch, rows).total
        if used <= room:
            return recomputed, rows, used
    return recomputed, rows, used
