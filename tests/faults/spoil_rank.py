"""A callback that makes one rank of a run fail in one step."""

from typing import Any

import torch
from lightning.pytorch import Callback


class SpoilRank(Callback):
    """Let one rank run out of memory, or its loss be no number, once.

    Args:
        rank: Which.
        step: The optimizer step, from 1.
        how: ``memory``; ``update``: of the optimizer, the first time; or ``nan`` while autocast is on.
    """

    def __init__(self, rank: int = 1, step: int = 3, how: str = "memory") -> None:
        self.rank, self.step, self.how = rank, step, how
        self._done = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.how != "update" or trainer.global_rank != self.rank:
            return
        original = torch.optim.AdamW.step

        def spoiled(*_: Any, **__: Any) -> Any:
            torch.optim.AdamW.step = original  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

        torch.optim.AdamW.step = spoiled  # type: ignore[method-assign]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.how == "update":
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

        pl_module.loss_sums = spoiled
