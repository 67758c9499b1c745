"""A callback that makes the report of a run take as long as that of a large one."""

import time
from typing import Any

from lightning.pytorch import Callback

from fine_tune import run_endings


class SlowReport(Callback):
    """Let the report take some seconds longer.

    Args:
        seconds: How long; launchers look after their processes every five.
    """

    def __init__(self, seconds: float = 7.0) -> None:
        self.seconds = seconds

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        original = run_endings.write_report

        def slow(*args: Any) -> None:
            time.sleep(self.seconds)
            original(*args)

        run_endings.write_report = slow
