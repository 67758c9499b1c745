"""A callback that kills one rank of a run."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback


class KillRank(Callback):
    """End a process as the kernel does when memory is out.

    Args:
        rank: Which.
        step: Before the step after this one.
    """

    def __init__(self, rank: int = 1, step: int = 3) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
