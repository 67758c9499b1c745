"""Lightning's early stopping, off until a patience is given."""

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from fine_tune.errors import UserError


class EarlyStopping(LightningEarlyStopping):
    """Stop when a validation metric no longer improves.

    Args:
        monitor: The metric to watch.
        patience: Validations without improvement before the run stops. None: never.
        min_delta: Change that counts as improvement.
        mode: Whether less (min) or more (max) of the metric is better.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int | None = None,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if patience is not None and patience < 1:
            raise UserError(
                f"early_stopping.patience: must be at least 1, or null to switch it off; got {patience}"
            )
        super().__init__(
            monitor, min_delta=min_delta, patience=patience or 1, mode=mode, check_finite=False
        )
        self.enabled = patience is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and self.wait_count >= self.patience:
            trainer.should_stop = (
                True  # the run had already stopped when it was killed, or taken up again
            )

    def _should_skip_check(self, trainer: Trainer) -> bool:
        return not self.enabled or super()._should_skip_check(trainer)
