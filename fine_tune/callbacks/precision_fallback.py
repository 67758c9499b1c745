"""Losses and gradients that are no finite numbers: caught before the update, and taken again in a safer precision."""

import logging
import math
import shlex
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from fine_tune.batches import StepFailure
from fine_tune.errors import GoBack, RunStopped, UserError
from fine_tune.runs.run_folder import run_of
from fine_tune.shards import whole

log = logging.getLogger("fine_tune")
LADDER = ("16-mixed", "bf16-mixed", "32-true")


class PrecisionFallback(Callback):
    """Go on in a safer precision when a loss or a gradient is infinite or no number.

    It is found before the update, so weights, optimizer and schedule are still those of the last good step; the same
    rows are taken again: first at a lower scale (16-mixed), then one step down the ladder 16-mixed, bf16-mixed where
    the device has it, 32-true. Where 32-true fails too, the run stops with the rows named. A lowered precision stays.

    Args:
        enabled: False stops the run at the first such step instead.
        max_skips: Times in a row that 16-mixed may lower its scale for one step before it is given up.
    """

    def __init__(self, enabled: bool = True, max_skips: int = 20) -> None:
        if max_skips < 0:
            raise UserError(f"precision_fallback.max_skips: must not be negative, got {max_skips}")
        self.enabled, self.max_skips = enabled, max_skips
        self._lowered_to: str | None = None
        self._skips = 0

    def state_dict(self) -> dict[str, Any]:
        return {"lowered_to": self._lowered_to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.go_on_in(state_dict["lowered_to"])

    def go_on_in(self, precision: str | None) -> None:
        """Lower the precision from the start of training on, and for the rest of the run; never raise it."""
        self._lowered_to = safer(self._lowered_to, precision)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.failure_handlers["precision_fallback"] = partial(self._handle, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep_lowered(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep_lowered(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep_lowered(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._skips = 0
        self._swap(trainer, pl_module)

    def _handle(self, trainer: Trainer, pl_module: Any, failure: StepFailure) -> bool:
        if failure.kind != "non_finite":
            return False
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scaling = scaler is not None and pl_module.step_precision is None and failure.row_ids
        if scaling and self._skips < self.max_skips and scaler.get_scale() > 1:
            self._skips += 1
            scaler.update(new_scale=scaler.get_scale() * scaler.get_backoff_factor())
            return True
        now = pl_module.step_precision or str(trainer.precision)
        lower = next_precision(now, trainer.strategy.root_device) if self.enabled else None
        where = f"{_what(failure)} not finite in {now}"
        if failure.row_ids:
            where += f" (rows {_listed(failure.row_ids)})"
        self._record(trainer, failure, where, lower)
        if not failure.row_ids or not weights_are_finite(pl_module):
            where += ", and the weights are not finite either" if failure.row_ids else ""
            if lower is not None:
                raise GoBack(f"{where}: an update was too large", lower)
            raise UserError(
                f"{where}: an update was too large. {_last_good(trainer)}; lower model.optimizer.lr, or set "
                "trainer.gradient_clip_val"
            )
        if lower is None:
            folder = shlex.quote(str(run_of(trainer).path))
            raise RunStopped(
                f"{where}; weights and optimizer are still those of step {failure.step - 1}. Look at these rows "
                f"(python -m fine_tune explain-step {folder} {failure.step}), lower model.optimizer.lr, "
                "or set trainer.gradient_clip_val"
            )
        log.info(
            "WARNING: %s; the same rows are taken again in %s, and the run goes on with it",
            where,
            lower,
        )
        self._lower(pl_module, lower)
        return True

    def _keep_lowered(self, trainer: Trainer, pl_module: Any) -> None:
        now = str(trainer.precision)
        if self._lowered_to is not None and safer(now, self._lowered_to) != now:
            log.info("precision: %s, lowered earlier in this run", self._lowered_to)
            self._lower(pl_module, self._lowered_to)
            self._swap(trainer, pl_module)

    def _lower(self, pl_module: Any, precision: str) -> None:
        pl_module.lower_precision(precision)
        self._lowered_to = precision

    def _swap(self, trainer: Trainer, pl_module: Any) -> None:
        # between steps: within one, the trainer's plugin still has to unscale what it scaled
        if pl_module.step_precision is None:
            return
        device = trainer.strategy.root_device.type
        lower = pl_module.step_precision
        plugin = Precision() if lower == "32-true" else MixedPrecision(lower, device)
        trainer.strategy.precision_plugin = plugin
        pl_module.step_precision = None

    def _record(
        self, trainer: Trainer, failure: StepFailure, event: str, lower: str | None
    ) -> None:
        if trainer.is_global_zero:
            run = run_of(trainer)
            entry = {"step": failure.step, "kind": "fallback", "to": lower, "event": event}
            entry["row_ids"] = failure.row_ids
            run.note_event(entry)


def next_precision(now: str, device: torch.device) -> str | None:
    """Return the next safer precision, or None: 16-mixed, bf16-mixed where the device has it, 32-true."""
    if now == "16-mixed":
        on_gpu = device.type == "cuda"
        return "bf16-mixed" if not on_gpu or torch.cuda.is_bf16_supported(False) else "32-true"
    return "32-true" if now == "bf16-mixed" else None


def weights_are_finite(pl_module: Any) -> bool:
    """Whether the norm of the trained weights is a finite number; it waits for the device."""
    groups = pl_module.trainer.optimizers[0].param_groups
    trained = [p.detach() for group in groups for p in group["params"]]
    return bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(trained))))


def _what(failure: StepFailure) -> str:
    if not failure.row_ids:  # found before a save
        return f"the weights after step {failure.step} are"
    what = "a gradient" if math.isfinite(failure.loss) else f"the loss ({failure.loss:g})"
    return f"{what} of step {failure.step} is"


def safer(first: str | None, second: str | None) -> str | None:
    """Return that of two precisions which lies further down the ladder; None is none."""
    known = [precision for precision in (first, second) if precision is not None]
    return max(known, key=_ladder_step, default=None)


def _ladder_step(precision: str) -> int:
    return LADDER.index(precision) if precision in LADDER else len(LADDER)


def _last_good(trainer: Trainer) -> str:
    trainer.strategy.checkpoint_io.wait()  # type: ignore[attr-defined]
    last = trainer.strategy.broadcast(run_of(trainer).checkpoint("last"))
    if last is None:
        return "There is no checkpoint from before"
    return f"The last checkpoint, {last.name}, is from before, and its weights are finite"


def _listed(row_ids: list[int]) -> str:
    shown = ", ".join(map(str, row_ids[:16]))
    return shown if len(row_ids) <= 16 else f"{shown} and {len(row_ids) - 16} more"
