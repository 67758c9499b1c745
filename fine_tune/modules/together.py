"""What all ranks do together: passes, where each has but a part of the weights, and the end of an evaluation.

A rank that has fewer parts than the others takes a row of no weight instead, so that nobody waits for ever.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fine_tune.batches import data_of
from fine_tune.errors import RanksApart, RunStopped
from fine_tune.ranks import any_rank, from_all_ranks
from fine_tune.shards import is_sharded

if TYPE_CHECKING:
    from fine_tune.modules.evaluating import EvaluatingModule


def parts_of_all(module: "EvaluatingModule", parts: list[slice]) -> Iterator[slice | None]:
    """Give this rank's parts of a step, then None as often as another rank still has some."""
    most = len(parts)
    if is_sharded(
        module.model
    ):  # before the first pass: a rank in its last one is in the middle of others' passes
        most = max(from_all_ranks(len(parts), module.trainer.world_size))
    yield from parts
    yield from [None] * (most - len(parts))


def others_go_on(module: "EvaluatingModule", i_do: bool) -> bool:
    """Whether any rank takes another pass of a batch; where they are taken together, all of them ask before each."""
    if not is_sharded(module.model):
        return i_do
    return any_rank(i_do, module.device, module.trainer.world_size)


def stopping_together(module: "EvaluatingModule", evaluate: Callable[[], None]) -> None:
    """Evaluate this rank's rows of a batch; where a rank cannot go on, all of them stop, and can save together.

    Raises:
        RunStopped: On every rank, with the problems of the first that has some.
    """
    stopped: RunStopped | None = None
    try:
        evaluate()
    except RunStopped as error:
        stopped = error
    world_size = module.trainer.world_size
    if not any_rank(stopped is not None, module.device, world_size):
        return
    problems = from_all_ranks(stopped.problems if stopped else (), world_size)
    together = RunStopped(*next(filter(None, problems)))
    together.on_all_ranks = True
    raise together from stopped


def out_of_memory_apart(module: "EvaluatingModule", where: str, tokens_at_once: int) -> RanksApart:
    """Return the error of a rank that ran out of memory where the others wait for its part of the weights.

    Args:
        module: Whose pass.
        where: In the middle of what.
        tokens_at_once: Padded tokens that did not fit, or may not have.
    """
    step = module.trainer.global_step + (where == "step")  # an evaluation is of the step just taken
    smaller = f"data.max_tokens_per_micro_batch: {max(1, tokens_at_once // 2)}"
    if where == "answers":  # no budget cuts them
        smaller = "generations.rows or generations.max_new_tokens lower"
    return RanksApart(
        f"rank {module.global_rank} ran out of memory in the {where} of step {step} ({tokens_at_once:,} padded tokens "
        "at once), and cannot take its rows again while the others wait for its part of the weights: go on from the "
        f"last checkpoint with {smaller}, model.gradient_checkpointing: true, or more devices"
    )


def spare_row(module: "EvaluatingModule") -> Any:
    """Return a batch of one training row, for a pass that counts nothing."""
    if module.spare_row is None:
        longest = data_of(module.trainer).longest_rows("train")
        last = len(longest["lengths"]) - 1
        batch = module.take_rows(longest, slice(last, last + 1))
        module.spare_row = module.trainer.strategy.batch_to_device(batch, device=module.device)
    return module.spare_row
