"""One optimizer step's gradient: micro-batches forward and backward, one division, one sum over ranks; or why not.

Out of memory is a local event: it is told to all ranks by a flag, nothing has changed, and the rows can be taken again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fine_tune.batches import StepFailure, cut_by_tokens
from fine_tune.device_memory import is_out_of_memory
from fine_tune.errors import GoBack
from fine_tune.modules.precision import lowered
from fine_tune.modules.ranks import (
    any_rank,
    from_all_ranks,
    sum_gradients_over_ranks,
    sum_over_ranks,
)
from fine_tune.modules.seeding import seed_all
from fine_tune.modules.trained_state import TrainedState

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule


def gradients(module: "StepModule", batch: Any) -> tuple[Tensor, Tensor, StepFailure | None]:
    """Sum the gradient of a step over all micro-batches and ranks, divided once.

    Args:
        module: What the rows cost, and the weights that get the gradient.
        batch: The rows of the optimizer step on this rank.

    Returns:
        The step's loss over all ranks, the norm of its gradient (scaled, under a gradient scaler), and why the gradient
        cannot be used, if so: then there is none, and nothing else has changed.
    """
    device, world_size = module.device, module.trainer.world_size
    seed_all(module.seed, module.trainer.global_step, module.global_rank)
    module.trainer.optimizers[0].zero_grad(set_to_none=True)
    loss = norm = torch.zeros((), device=device)
    mine = torch.tensor(module.loss_count(batch), dtype=torch.float64)
    count = sum_over_ranks(mine, device, world_size).item()
    out_of_memory = False
    try:
        for rows in cut_by_tokens(batch["lengths"], module.max_tokens_per_micro_batch):
            with lowered(module.step_precision, device):
                micro_loss = module.loss_sum(module.take_rows(batch, rows)) / count
            with torch.autocast(device.type, enabled=False):
                module.trainer.strategy.backward(micro_loss, None)
            loss = loss + micro_loss.detach()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True  # dealt with below: the traceback holds the activations
    if any_rank(out_of_memory, device, world_size):
        return loss, norm, _failure(module, "out_of_memory", batch)
    trained = [p for p in module.parameters() if p.requires_grad]
    sum_gradients_over_ranks(trained, device, world_size)
    loss = sum_over_ranks(loss, device, world_size)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if not torch.isfinite(loss + norm):  # the step's one wait for the device
        return loss, norm, _failure(module, "non_finite", batch, float(loss))
    return loss, norm, None


def update(module: "StepModule", take_step: Callable[[], None]) -> None:
    """Update the weights; an update that runs out of memory is undone and taken again.

    Args:
        module: Whose weights; a failure goes to its guards.
        take_step: Steps the optimizer, the gradient's computation included.

    Raises:
        GoBack: It cannot be undone in memory: all weights are trained.
    """
    trainer = module.trainer
    before = TrainedState(trainer.optimizers[0]) if module.keeps_state else None
    while True:
        out_of_memory = False
        try:
            take_step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if not any_rank(out_of_memory, module.device, trainer.world_size):
            return
        step = trainer.global_step + 1
        if before is None:
            raise GoBack(f"the optimizer ran out of memory at step {step}, half of its update done")
        before.restore()
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.update(new_scale=scaler.get_scale())  # forget that gradients were unscaled
        module.handle(StepFailure("out_of_memory", "optimizer", step, [], [], 0, 0))


def _failure(
    module: "StepModule", kind: str, batch: Any, loss: float = float("nan")
) -> StepFailure:
    module.trainer.optimizers[0].zero_grad(set_to_none=True)
    lengths = batch["lengths"]
    cuts = cut_by_tokens(lengths, module.max_tokens_per_micro_batch)
    sizes = [(lengths[cut.start] * (cut.stop - cut.start), cut.stop - cut.start) for cut in cuts]
    mine = (max(sizes, default=(0, 0)), list(batch["row_ids"]), list(lengths))
    ranks = from_all_ranks(mine, module.trainer.world_size)
    tokens_at_once, rows_at_once = max(largest for largest, _, _ in ranks)
    return StepFailure(
        kind,
        "step",
        module.trainer.global_step + 1,
        row_ids=[row_id for _, ids, _ in ranks for row_id in ids],
        lengths=[length for _, _, of_rank in ranks for length in of_rank],
        rows_at_once=rows_at_once,
        tokens_at_once=tokens_at_once,
        loss=loss,
    )
