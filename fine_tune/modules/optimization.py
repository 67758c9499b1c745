"""The optimizer's parameter groups, and the learning rate's schedule."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from transformers import get_scheduler

from fine_tune.errors import UserError

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


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, split_lora_b: bool = False
) -> list[dict[str, Any]]:
    """Group the trainable parameters: matrices decay by the optimizer's ``weight_decay``, vectors do not.

    Args:
        parameters: Names and parameters, as ``named_parameters`` gives them.
        split_lora_b: Keep LoRA's B matrices apart, for a learning rate of their own.

    Returns:
        Up to three groups that are not empty.
    """
    named = [(name, p) for name, p in parameters if p.requires_grad]
    matrices = [(".lora_B." in name, p) for name, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    if not split_lora_b:
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in matrices]},
            {"params": vectors, "weight_decay": 0.0},
        ]
    else:
        groups = [
            {"params": [p for is_b, p in matrices if not is_b]},
            {"params": [p for is_b, p in matrices if is_b]},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    optimizer: OptimizerCallable,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    lora_plus_ratio: float | None,
) -> torch.optim.Optimizer:
    """Build the optimizer; under LoRA+ (arXiv 2402.12354) B matrices learn at ``lora_plus_ratio`` times its rate.

    As in the authors' and peft's code, vectors (biases, DoRA's magnitudes) learn at the rate of B. Adapters of an
    embedding keep the base rate: their B is not the matrix that starts at zero.
    """
    if lora_plus_ratio is None:
        return fused(optimizer(parameter_groups(parameters)))
    named = list(parameters)
    faster = {id(p) for name, p in named if ".lora_B." in name or p.ndim < 2}
    built = optimizer(parameter_groups(named, split_lora_b=True))
    for group in built.param_groups:
        are_faster = {id(p) in faster for p in group["params"]}
        if len(are_faster) > 1:
            raise UserError(
                f"model.lora_plus_ratio: {type(built).__name__} makes parameter groups of its own, so B matrices "
                "cannot get a rate of theirs; leave the ratio out, or take an optimizer that keeps its groups"
            )
        if are_faster == {True}:
            group["lr"] = group["lr"] * lora_plus_ratio
    return fused(built)


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let torch's Adam and AdamW update in one pass over memory, unless the user chose how: about 6 times as fast.

    Set in the groups and not in the constructor, it leaves gradients to the scaler of 16-mixed, so that clipping works.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return optimizer
    for group in optimizer.param_groups:
        chosen = [group[name] for name in ("fused", "foreach", "capturable", "differentiable")]
        plain = all(
            type(p) is torch.nn.Parameter
            and p.device.type in ("cpu", "cuda")
            and p.is_floating_point()
            for p in group["params"]
        )
        if plain and not any(chosen) and chosen[:2] == [None, None]:
            group["fused"] = True
    return optimizer


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
        trial = optimizer(parameter_groups(torch.nn.Linear(2, 2).named_parameters()))
    except (ValueError, TypeError) as error:
        return [f"model.optimizer: {error}"]
    rate = trial.param_groups[0].get("lr")
    if rate is None or not 0 < float(rate) < float("inf"):
        return [f"model.optimizer.lr: the learning rate must be above 0 and finite, got {rate}"]
    return []
