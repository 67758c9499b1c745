"""Settings of optimizer and schedule that were changed for a resumed run: made to take effect on a restored state."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from fine_tune.modules.run_identity import optimizer_settings

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule

log = logging.getLogger("fine_tune")


def step_settings(module: "StepModule") -> dict[str, Any]:
    """Return what optimizer and schedule were set to; a restored state brings it along, changed or not."""
    return {
        **optimizer_settings(module.optimizer),
        "model.lora_plus_ratio": module.lora_plus_ratio,
        "model.lr_scheduler": module.lr_scheduler,
        "num_warmup_steps": module.num_warmup_steps(module.plan),
        "num_steps": module.plan.num_steps,
    }


def forget_failed_step(loop: dict[str, Any], step: int) -> None:
    """Let a fit loop's saved state count the steps that were taken, and not the batch of one that failed meanwhile.

    Lightning validates and logs by the number of batches that it began with.

    Args:
        loop: Lightning's state of it, changed in place.
        step: Optimizer steps taken.
    """
    for loader in loop.get("state_dict", {}).get("combined_loader", []):
        loader["num_handed_over"] = step
    progress = loop["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        count["ready"] = count["started"] = count["processed"]


def follow_settings(module: "StepModule", checkpoint: dict[str, Any]) -> None:
    """Make the module's settings take effect on the state of a checkpoint that is about to be restored for training.

    Args:
        module: Of the run that goes on.
        checkpoint: Lightning's, changed in place.
    """
    if checkpoint["global_step"] < module.plan.num_steps:  # the last of a shorter run, perhaps
        loop = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        loop["is_last_batch"] = False
    then, now = checkpoint.get("run_settings"), step_settings(module)
    if then is not None and then != now:
        new = module.configure_optimizers()
        take_over(
            checkpoint,
            new["optimizer"],
            new["lr_scheduler"]["scheduler"],
            same_class=then.get("model.optimizer") == now["model.optimizer"],
        )


def take_over(
    checkpoint: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    same_class: bool,
) -> None:
    """Replace, in a checkpoint about to be restored, what its optimizer and schedule were set to.

    A restored state brings its own learning rate, weight decay and base rates; without this a changed setting would
    be ignored without a word. Moments stay, unless the optimizer is another one or groups its weights otherwise.

    Args:
        checkpoint: Lightning's, changed in place.
        optimizer: Built with the new settings, without state.
        scheduler: Its schedule.
        same_class: Whether the checkpoint's optimizer is of the same class.
    """
    state, position = checkpoint["optimizer_states"][0], checkpoint["lr_schedulers"][0]
    rates = [
        base * shape(position["last_epoch"])
        for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    groups = optimizer.state_dict()["param_groups"]
    if not same_class or _weights(groups) != _weights(state["param_groups"]):
        log.info("WARNING: the optimizer's state does not fit the new settings; it starts anew")
        state["state"] = {}
    state["param_groups"] = [
        {**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)
    ]
    position.update(
        base_lrs=list(scheduler.base_lrs), _last_lr=rates, lr_lambdas=[None] * len(rates)
    )


def _weights(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [list(group["params"]) for group in groups]
