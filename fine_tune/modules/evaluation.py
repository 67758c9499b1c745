"""Rows evaluated and prompts answered in parts that fit the device; a part that does not is taken in smaller ones."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fine_tune.batches import StepFailure, cut_by_tokens
from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory
from fine_tune.modules.generation import generate
from fine_tune.modules.packing import attending_by
from fine_tune.modules.precision import lowered
from fine_tune.modules.together import others_go_on, out_of_memory_apart, spare_row
from fine_tune.shards import is_sharded

if TYPE_CHECKING:
    from fine_tune.modules.evaluating import EvaluatingModule

log = logging.getLogger("fine_tune")


def in_parts(
    module: "EvaluatingModule",
    batch: Any,
    take: Callable[[Any], None],
    *,
    take_rows: Callable[[Any, slice], Any] | None = None,
    row_ids: list[int] | None = None,
) -> None:
    """Take the rows of a batch, longest first, in parts that fit the device, each of them once.

    Args:
        module: Cuts the batch; a part that does not fit goes to its guards.
        batch: Any batch of its kind.
        take: Gets each part; it changes nothing before its last computation.
        take_rows: Cuts a batch of another kind.
        row_ids: Its rows.
    """
    start, lengths = 0, batch["lengths"]
    take_rows, row_ids = take_rows or module.take_rows, row_ids or batch["row_ids"]
    while others_go_on(module, start < len(lengths)):
        if start >= len(lengths):
            with lowered(module.step_precision, module.device):
                module.loss_of_no_weight(spare_row(module))
            continue
        first = cut_by_tokens(lengths[start:], module.max_tokens_per_micro_batch)[0]
        rows, out_of_memory = slice(start, start + first.stop), False
        try:
            with (
                lowered(module.step_precision, module.device),
                attending_by(module.model, module.rows_attention),
            ):
                take(take_rows(batch, rows))
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            if is_sharded(module.model):
                raise out_of_memory_apart(
                    module, "evaluation", lengths[start] * first.stop
                ) from error
            out_of_memory = True
        if not out_of_memory:
            start = rows.stop
            continue
        module.handle(
            StepFailure(
                "out_of_memory",
                "evaluation",
                module.trainer.global_step,
                row_ids=list(row_ids[rows]),
                lengths=list(lengths[rows]),
                rows_at_once=first.stop,
                tokens_at_once=lengths[start] * first.stop,
            )
        )


def log_evaluation(module: "EvaluatingModule", split: str) -> None:
    """Log what a split measured: to the loggers while training, else to the run's record alone.

    Args:
        module: Whose metrics; they start anew. Its ``intervals`` become those of 95 %.
        split: ``val`` or ``test``.
    """
    computed = module.metrics.compute()
    values = {f"{split}/{name}": computed[name].float() for name in module.evaluation_metrics}
    ends = {name: (f"{name}_low", f"{name}_high") for name in module.evaluation_metrics}
    module.intervals = {
        f"{split}/{name}": [float(computed[end]) for end in pair]
        for name, pair in ends.items()
        if computed.keys() >= set(pair) and all(torch.isfinite(computed[end]) for end in pair)
    }
    module.metrics.reset()
    if module.compares_rows:
        module.measured_rows = module.row_losses.take(module.trainer.world_size)
    for name, value in values.items():
        if not torch.isfinite(value):
            log.info("WARNING: %s is %s", name, float(value))
    step = module.trainer.global_step
    fitting = module.trainer.state.fn == "fit"
    if fitting:
        values |= {f"{split}_{name}": value for name, value in module.interval_metrics().items()}
        values |= {
            "step": torch.tensor(float(step)),
            "epoch": torch.tensor(step / module.plan.steps_per_epoch),
            "perf/evaluation_seconds": torch.tensor(module.throughput.paused_seconds()),
        }
    module.log_dict(values, logger=fitting)


def answer(
    module: "EvaluatingModule",
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Answer prompts greedily, half as many at once where they do not fit, from then on."""
    options, most = (max_new_tokens, stop_ids, pad_token_id), module.prompts_at_once
    if most is not None and most < len(prompts):
        parts = [prompts[start : start + most] for start in range(0, len(prompts), most)]
        return [text for part in parts for text in answer(module, part, *options)]
    try:
        with (
            module.trainer.precision_plugin.forward_context(),
            lowered(module.step_precision, module.device),
            torch.compiler.set_stance("force_eager"),  # lengths and caches of many shapes
        ):
            return generate(module.model, prompts, max_new_tokens, stop_ids, pad_token_id)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        if is_sharded(module.model):
            longest = max(map(len, prompts)) + max_new_tokens
            raise out_of_memory_apart(module, "answers", longest * len(prompts)) from error
    lengths, rows = [len(prompt) for prompt in prompts], len(prompts)
    tokens, step = (max(lengths) + max_new_tokens) * rows, module.trainer.global_step
    module.handle(StepFailure("out_of_memory", "generation", step, [], lengths, rows, tokens))
    module.prompts_at_once = rows // 2
    return answer(module, prompts, *options)
