"""A callback that makes one rank of a run fail in one step."""

from typing import Any

import torch
from lightning.pytorch import Callback

from fine_tune import ranks
from fine_tune.batches import StepFailure


class SpoilRank(Callback):
    """Let one rank run out of memory, or its loss be no number, once, or its validation be refused.

    Args:
        rank: Which.
        step: The optimizer step, from 1.
        how: ``memory``; ``sum``: memory, for the sum of gradients; ``update``: memory, for the optimizer's first
            update; ``nan`` while autocast is on; ``validation``: no row of any fits (``step`` is ignored);
            ``several``: no two rows of any validation fit together; ``weights``: on all ranks, a weight infinite
            after the fourth step in ``bf16-mixed``.
    """

    def __init__(self, rank: int = 1, step: int = 3, how: str = "memory") -> None:
        self.rank, self.step, self.how = rank, step, how
        self._done = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        owner: Any
        if trainer.global_rank != self.rank or self.how not in ("update", "sum"):
            return
        owner, name = (ranks, "_rooms") if self.how == "sum" else (torch.optim.AdamW, "step")
        original = getattr(owner, name)

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            if self._done or (self.how == "sum" and trainer.global_step + 1 != self.step):
                return original(*args, **kwargs)
            self._done = True
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

        setattr(owner, name, spoiled)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        ruined = self.how == "weights" and trainer.global_step == 4
        if ruined and pl_module.step_precision is None and trainer.precision == "bf16-mixed":
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).view(-1)[0] = torch.inf

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.how in ("update", "sum", "weights"):
            return
        original = pl_module.loss_sums

        def spoiled(micro_batch: Any) -> tuple[torch.Tensor]:
            (loss,) = original(micro_batch)
            if trainer.global_rank != self.rank or trainer.global_step + 1 != self.step:
                return (loss,)
            if self.how == "nan":
                return (loss * float("nan") if torch.is_autocast_enabled("cpu") else loss,)
            if not self._done:
                self._done = True
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            return (loss,)

        def unfit(*_: Any) -> None:
            step = trainer.global_step
            failure = StepFailure("out_of_memory", "evaluation", step, [], [9], 1, 9)
            pl_module.handle(failure)

        evaluate = pl_module.evaluate

        def one_by_one(micro_batch: Any) -> None:
            if len(micro_batch["lengths"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            evaluate(micro_batch)

        if self.how not in ("validation", "several"):
            pl_module.loss_sums = spoiled
        elif trainer.global_rank == self.rank:
            pl_module.evaluate = unfit if self.how == "validation" else one_by_one
