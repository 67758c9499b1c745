"""One optimizer step's gradient: micro-batches forward and backward, one division, one sum over ranks; or why not.

Out of memory is a local event: it is told to all ranks by a flag, nothing has changed, and the rows can be taken again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fine_tune.batches import StepFailure, cut_by_tokens
from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory
from fine_tune.modules.packing import attending_by
from fine_tune.modules.precision import lowered
from fine_tune.modules.recomputing import kept_on_host
from fine_tune.modules.seeding import seed_all
from fine_tune.modules.together import out_of_memory_apart, parts_of_all, spare_row
from fine_tune.modules.trained_state import TrainedState
from fine_tune.ranks import (
    any_rank,
    from_all_ranks,
    sum_gradients_over_ranks,
    sum_over_ranks,
)
from fine_tune.shards import is_sharded, whole

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule


@dataclass(frozen=True)
class StepGradient:
    """What the rows of a step gave, over all ranks; the gradient itself lies in the parameters.

    Args:
        loss: The step's loss, without its graph, on the host.
        norm: Of the gradient, on the host; scaled, under a gradient scaler.
        metrics: Means over the step of what the module measures beside its loss.
        num_tokens: Tokens of the step's rows, of each rank.
        failure: Why the gradient cannot be used, if so: then there is none, and nothing else has changed.
    """

    loss: Tensor
    norm: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: list[float] = field(default_factory=list)
    failure: StepFailure | None = None


def gradients(module: "StepModule", batch: Any) -> StepGradient:
    """Sum the gradient of a step over all micro-batches and ranks, divided once.

    Args:
        module: What the rows cost, and the weights that get the gradient.
        batch: The rows of the optimizer step on this rank.
    """
    device, world_size = module.device, module.trainer.world_size
    seed_all(module.seed, module.trainer.global_step, module.global_rank)
    module.trainer.optimizers[0].zero_grad(set_to_none=True)
    mine = torch.zeros(1 + world_size, dtype=torch.float64)
    mine[0], mine[1 + module.global_rank] = module.loss_count(batch), sum(batch["lengths"])
    count, *num_tokens = sum_over_ranks(mine, device, world_size).tolist()
    # The loss, then the metrics in their order: summed over micro-batches here, and over ranks together.
    sums = torch.zeros(1 + len(module.step_metrics), device=device)
    out_of_memory, rows = False, None
    try:
        with (
            attending_by(module.model, module.rows_attention),
            kept_on_host(module, active=module.offload_activations),
        ):
            cuts = cut_by_tokens(batch["lengths"], module.max_tokens_per_micro_batch)
            for rows in parts_of_all(module, cuts):
                with lowered(module.step_precision, device):
                    if rows is None:
                        micro_loss, others = module.loss_of_no_weight(spare_row(module)), []
                    else:
                        loss_sum, *others = module.loss_sums(module.take_rows(batch, rows))
                        micro_loss = loss_sum / count
                with torch.autocast(device.type, enabled=False):
                    module.trainer.strategy.backward(micro_loss, None)
                if rows is not None:
                    parts = [micro_loss.detach(), *(other / count for other in others)]
                    sums = sums + torch.stack(parts)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        if is_sharded(module.model):
            raise out_of_memory_apart(module, "step", _at_once(batch, rows)[0]) from error
        out_of_memory = True  # dealt with below: the traceback holds the activations
    trained = [p for p in module.parameters() if p.requires_grad]
    failed = rows if out_of_memory else None  # on this rank
    did_not_fit = any_rank(out_of_memory, device, world_size)
    if not (
        did_not_fit
        or is_sharded(module.model)
        or sum_gradients_over_ranks(trained, device, world_size)
    ):
        did_not_fit, failed = True, _most_at_once(module, batch)
    if did_not_fit:
        failure = _failure(module, "out_of_memory", batch, failed=failed)
        return StepGradient(sums[0], torch.zeros(()), failure=failure)
    loss, *means = sum_over_ranks(sums, device, world_size)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    loss, norm = torch.stack([loss, norm]).cpu().unbind()  # the step's one wait for the device
    if not torch.isfinite(loss + norm):
        failure = _failure(module, "non_finite", batch, loss=float(loss))
        return StepGradient(loss, norm, failure=failure)
    return StepGradient(loss, norm, dict(zip(module.step_metrics, means, strict=True)), num_tokens)


def update(module: "StepModule", take_step: Callable[[], None]) -> None:
    """Update the weights; an update that runs out of memory is undone and taken again.

    Args:
        module: Whose weights; a failure goes to its guards.
        take_step: Steps the optimizer, the gradient's computation included.

    Raises:
        GoBack: It cannot be undone in memory: all weights are trained, and the guards say so.
    """
    trainer = module.trainer
    before = TrainedState(trainer.optimizers[0]) if module.keeps_state else None
    while True:
        out_of_memory = False
        try:
            take_step()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        if not any_rank(out_of_memory, module.device, trainer.world_size):
            return
        step = trainer.global_step + 1
        if before is not None:
            before.restore()
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.update(new_scale=scaler.get_scale())  # forget that gradients were unscaled
        module.handle(StepFailure("out_of_memory", "optimizer", step))


def _failure(
    module: "StepModule",
    kind: str,
    batch: Any,
    *,
    failed: slice | None = None,
    loss: float = float("nan"),
) -> StepFailure:
    module.trainer.optimizers[0].zero_grad(set_to_none=True)
    lengths, at_once = batch["lengths"], None
    if failed is not None:
        at_once = _at_once(batch, failed)
    mine = (at_once, list(batch["row_ids"]), list(lengths))
    ranks = from_all_ranks(mine, module.trainer.world_size)
    tokens_at_once, rows_at_once = _to_get_smaller([found for found, _, _ in ranks if found])
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


def _at_once(batch: Any, rows: slice | None) -> tuple[int, int]:
    """Return the padded tokens and the rows of a micro-batch; 0 of a pass that counts nothing."""
    lengths = batch["lengths"][rows] if rows is not None else []
    return len(lengths) * max(lengths, default=0), len(lengths)


def _most_at_once(module: "StepModule", batch: Any) -> slice | None:
    lengths = batch["lengths"]
    cuts = cut_by_tokens(lengths, module.max_tokens_per_micro_batch)
    return max(cuts, key=lambda cut: lengths[cut.start] * (cut.stop - cut.start), default=None)


def _to_get_smaller(failed: list[tuple[int, int]]) -> tuple[int, int]:
    # (tokens, rows) of what failed on each rank: less than all of several rows; the longest row, where each is alone
    several = [(tokens, rows) for tokens, rows in failed if rows > 1]
    return min(several) if several else max(failed, default=(0, 0))
