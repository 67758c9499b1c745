"""What can be wrong with a module's settings, and with a plan held against its model: told before weights load."""

from typing import Any

from transformers import PreTrainedConfig

from fine_tune.batches import DataPlan
from fine_tune.errors import UserError


def source_problems(
    model_name_or_path: str | None, from_config: Any, quantization: str | None, lora: Any
) -> list[str]:
    """Say what does not go together among the settings that make the model."""
    problems = []
    if (model_name_or_path is None) == (from_config is None):
        given = "both" if from_config is not None else "neither"
        problems.append(
            f"model.model_name_or_path, model.from_config: give one of them, {given} given"
        )
    if quantization is not None and lora is None:
        problems.append(
            "model.quantization: quantized weights are frozen; set model.lora, like auto"
        )
    if quantization is not None and model_name_or_path is None:
        problems.append(
            "model.quantization: needs weights to quantize; set model.model_name_or_path"
        )
    return problems


def warmup_problems(steps: int | None, ratio: float | None) -> list[str]:
    """Say what is wrong with the length of the warm-up."""
    problems = []
    if steps is not None and ratio is not None:
        problems.append("model.warmup_steps, model.warmup_ratio: give one of them, not both")
    if steps is not None and steps < 0:
        problems.append(f"model.warmup_steps: must not be negative, got {steps}")
    if ratio is not None and not 0 <= ratio <= 1:
        problems.append(f"model.warmup_ratio: must lie between 0 and 1, got {ratio}")
    return problems


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest row a model's positions allow, or None if its config sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions is not None else None


def plan_problems(plan: DataPlan, config: PreTrainedConfig, num_warmup_steps: int) -> list[str]:
    """Say where the data does not fit the model, or the warm-up the planned epochs."""
    positions, longest = max_positions(config), max(plan.longest_row.values())
    problems = []
    if positions is not None and longest > positions:
        problems.append(
            f"data.max_length: {plan.max_length} lets rows of {longest} tokens through, but the model has "
            f"{positions} positions; set --data.max_length {positions}"
        )
    if plan.largest_token_id >= config.vocab_size:
        problems.append(
            f"model.tokenizer: it gives token id {plan.largest_token_id}, but the model's vocabulary has "
            f"{config.vocab_size} entries; this is another model's tokenizer"
        )
    if num_warmup_steps > plan.planned_steps:
        problems.append(
            f"model.warmup_steps: {num_warmup_steps} is longer than the {plan.planned_steps} steps of all epochs "
            f"({plan.steps_per_epoch} per epoch); lower it or give model.warmup_ratio"
        )
    return problems


def refuse_another_run(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other rows or another learning rate than the checkpoint's.

    Args:
        then: Settings kept in the checkpoint.
        now: The same settings of the run that would go on.

    Raises:
        UserError: One line per difference.
    """
    changed = [
        f"{key}: the checkpoint was trained with {then[key]}, this run would go on with {value}; "
        "set it back, or start a new run from the checkpoint's folder as model.model_name_or_path"
        for key, value in now.items()
        if key in then and then[key] != value
    ]
    if changed:
        raise UserError(*changed)
