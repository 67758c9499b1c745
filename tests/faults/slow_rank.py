"""A callback that makes one rank of a run come late to the rehearsal of the worst step."""

import time
from typing import Any

from lightning.pytorch import Callback

from fine_tune.callbacks import rehearsal


class SlowRank(Callback):
    """Let rank 1 take its rows later than rank 0.

    Args:
        seconds: How much later.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        on_device = rehearsal._on_device

        def late(*args: Any) -> Any:
            time.sleep(self.seconds * trainer.global_rank)
            return on_device(*args)

        rehearsal._on_device = late
