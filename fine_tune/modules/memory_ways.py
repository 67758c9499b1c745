"""The ways to train a model (all weights, LoRA, QLoRA; with and without recomputing), and what of each fits."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from fine_tune import adapters
from fine_tune.batches import cut_by_tokens
from fine_tune.modules.memory_plan import MemoryPlanner, StepMemory
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.recomputing import Recomputing


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        name: For the user.
        settings: The model's.
        flags: What makes it of the settings that are given; empty where that is what they say.
    """

    name: str
    settings: ModelSettings
    flags: str


@dataclass(frozen=True)
class Fitting:
    """The largest micro-batch of a way to train that fits.

    Args:
        rows: Of the longest, at a time.
        memory: What they take.
        flags: To paste behind ``fit --config ...``.
    """

    rows: int
    memory: StepMemory
    flags: str


def ways_to_train(settings: ModelSettings, config: PreTrainedConfig) -> list[Way]:
    """List how a model could be trained, as it is set first; each without and with recomputed activations."""
    chosen = [Way(_name(settings), settings, "")]
    if settings.from_config is None and settings.continued_adapter is None:
        lora = settings.lora or adapters.auto_lora(config)
        stored = settings.quantized if settings.quantization is None else None
        others = [(None, None), (lora, None), (lora, "nf4")]
        for adapter, quantization in others if stored is None else []:
            other = _replaced(settings, lora=adapter, quantization=quantization)
            if _name(other) != chosen[0].name:
                chosen.append(Way(_name(other), other, _flags(settings, other)))
    return [
        Way(way.name, _replaced(way.settings, gradient_checkpointing=recomputed), way.flags)
        for way in chosen
        for recomputed in (False, True)
    ]


def way_as_set(settings: ModelSettings, *, recomputed: Recomputing) -> Way:
    """Return the way that the settings say, with as much of the activations recomputed."""
    return Way(_name(settings), _replaced(settings, gradient_checkpointing=recomputed), "")


def largest_rows(lengths: list[int], budget: int | None) -> int:
    """Return the rows of the first micro-batch, which holds the longest."""
    return cut_by_tokens(lengths, budget)[0].stop


def largest_budget(planner: MemoryPlanner, way: Way, batch: Any, room: float) -> Fitting | None:
    """Find the most rows at once that fit; None if one does not.

    Args:
        planner: Says what they take.
        way: To train.
        batch: The longest rows of a step.
        room: Bytes there are.
    """
    lengths = batch["lengths"]
    fits, too_many = 0, len(lengths) + 1
    memory: dict[int, StepMemory] = {}
    tried = len(lengths)  # then where a line through what is known meets the room
    while fits + 1 < too_many:
        memory[tried] = planner.at_once(way.settings, batch, tried)
        if memory[tried].total <= room:
            fits = tried
        else:
            too_many = tried
        tried = _next(memory, fits, too_many, room)
    if fits == 0:
        return None
    checkpointing = str(way.settings.gradient_checkpointing or False).lower()
    budget = f"--data.max_tokens_per_micro_batch {fits * lengths[0]}"
    flags = " ".join(
        part
        for part in (way.flags, f"--model.gradient_checkpointing {checkpointing}", budget)
        if part
    )
    return Fitting(fits, memory[fits], flags)


def _next(memory: dict[int, StepMemory], fits: int, too_many: int, room: float) -> int:
    if fits == 0:
        return 1 if 1 not in memory else max(1, too_many // 2)
    if too_many not in memory:
        return fits + 1
    low, high = memory[fits].total, memory[too_many].total
    share = (room - low) / max(1, high - low)
    return min(too_many - 1, max(fits + 1, fits + int(share * (too_many - fits))))


def _replaced(settings: ModelSettings, **changes: Any) -> ModelSettings:
    other = replace(settings, **changes)
    if "quantization" not in changes:
        other.quantized = settings.quantized
        other.continued_adapter = settings.continued_adapter
    return other


def _name(settings: ModelSettings) -> str:
    if settings.lora is None:
        return "all weights"
    return {"nf4": "QLoRA", "fp4": "QLoRA (fp4)", "int8": "LoRA on int8", None: "LoRA"}.get(
        settings.quantized, f"LoRA on {settings.quantized}"
    )


def _flags(settings: ModelSettings, other: ModelSettings) -> str:
    flags = []
    if (settings.lora is None) != (other.lora is None):
        flags.append(f"--model.lora {'auto' if other.lora is not None else 'null'}")
    if settings.quantization != other.quantization:
        flags.append(f"--model.quantization {other.quantization or 'null'}")
    return " ".join(flags)
