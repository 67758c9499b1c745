"""The optimizer's parameter groups, and the learning rate's schedule."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from transformers import get_scheduler

Schedule = Literal["cosine", "linear", "constant", "wsd"]
_HF_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
_WSD_DECAY_SHARE = (
    0.1  # of all steps, the decay of warmup-stable-decay (MiniCPM, arXiv 2404.06395, section 4)
)


def parameter_groups(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Group the trainable parameters: matrices decay by the optimizer's ``weight_decay``, vectors do not."""
    trainable = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def schedule(
    optimizer: torch.optim.Optimizer, name: Schedule, *, num_warmup_steps: int, num_steps: int
) -> Any:
    """Return the learning-rate schedule, transformers' own: linear warm-up from 0, then the named shape to 0.

    Args:
        optimizer: Whose learning rate is scheduled.
        name: The shape; ``constant`` stays, ``wsd`` stays and then falls over the last tenth.
        num_warmup_steps: Optimizer steps of warm-up.
        num_steps: Optimizer steps of the run.
    """
    extra = {}
    if name == "wsd":
        decay = max(1, int(_WSD_DECAY_SHARE * num_steps))
        stable = max(0, num_steps - num_warmup_steps - decay)
        extra = {"num_decay_steps": decay, "num_stable_steps": stable}
    return get_scheduler(
        _HF_SCHEDULES[name],
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=None if name == "wsd" else num_steps,
        scheduler_specific_kwargs=extra,
    )


def optimizer_problems(optimizer: OptimizerCallable) -> list[str]:
    """Try an optimizer on one parameter, and say what is wrong with its settings."""
    try:
        trial = optimizer(parameter_groups(torch.nn.Linear(2, 2).parameters()))
    except (ValueError, TypeError) as error:
        return [f"model.optimizer: {error}"]
    rate = trial.param_groups[0].get("lr")
    if rate is None or not 0 < float(rate) < float("inf"):
        return [f"model.optimizer.lr: the learning rate must be above 0 and finite, got {rate}"]
    return []
