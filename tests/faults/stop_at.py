"""A callback that ends a run on purpose."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback


class StopAt(Callback):
    """End the process, or raise, after a step.

    Args:
        step: The optimizer step.
        kill: SIGKILL instead of an exception.
    """

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a defect")
