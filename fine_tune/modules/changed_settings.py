"""Settings of optimizer and schedule that were changed for a resumed run: made to take effect on a restored state."""

import logging
from typing import Any

import torch

log = logging.getLogger("fine_tune")


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
