"""A callback that fills the disk the run folder lies on."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class FillDisk(Callback):
    """Fill the disk after a step, and free it after another.

    Args:
        at: The optimizer step to fill it after.
        leave: Bytes to leave free.
        until: The step to free it after; 0: never.
    """

    def __init__(self, at: int, leave: int, until: int = 0) -> None:
        self.at, self.leave, self.until = at, leave, until

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if not trainer.is_global_zero:
            return
        root = Path(trainer.loggers[0].save_dir).parents[2]
        if trainer.global_step == self.at:
            room = shutil.disk_usage(root).free - self.leave
            assert room < 64e6  # a small disk made for the test
            (root / "filler").write_bytes(b"\0" * room)
        elif self.until and trainer.global_step == self.until:
            (root / "filler").unlink()
