"""When to save, what to keep: the last checkpoint and the best ones, named by true epoch and step."""

import math
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fine_tune.batches import plan_of
from fine_tune.errors import UserError
from fine_tune.run_folder import RunFolder, run_of


class Checkpoints(Checkpoint):
    """Save the run so that it can be resumed, and so that its best weights are kept.

    A checkpoint is written every ``every`` steps, after each validation, and after the last step.

    Args:
        every: ``epoch``, or a number of optimizer steps.
        keep: How many of the best checkpoints to keep, by ``monitor``; the last is always kept.
        monitor: The validation metric that decides which is best.
        mode: Whether less (min) or more (max) of it is better.
    """

    def __init__(
        self,
        every: Literal["epoch"] | int = "epoch",
        keep: int = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if keep < 1 or (every != "epoch" and every < 1):
            raise UserError(f"checkpoint: every {every} and keep {keep} must be at least 1")
        self.every, self.keep, self.monitor, self.mode = every, keep, monitor, mode
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step, plan = trainer.global_step, plan_of(trainer)
        every = plan.steps_per_epoch if self.every == "epoch" else self.every
        due = step % every == 0 or step >= plan.num_steps or trainer.should_stop
        if due and not self._validation_follows(trainer, step):
            self._save(trainer, score=None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.state.fn != "fit"
            or trainer.sanity_checking
            or trainer.global_step == self._saved_step
        ):
            return
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise UserError(
                f"checkpoint.monitor: '{self.monitor}' is not measured; known: {', '.join(known)}"
            )
        self._save(trainer, score=float(trainer.callback_metrics[self.monitor]))

    def _validation_follows(self, trainer: Trainer, step: int) -> bool:
        if "validation" not in plan_of(trainer).num_rows or not trainer.enable_validation:
            return False
        if trainer.should_stop or step >= plan_of(trainer).num_steps:
            return True
        interval = trainer.val_check_batch
        return bool(interval) and interval != math.inf and step % int(interval or 1) == 0

    def _save(self, trainer: Trainer, score: float | None) -> None:
        step, plan = trainer.global_step, plan_of(trainer)
        if step == self._saved_step:
            return
        self._saved_step = step
        run = run_of(trainer)
        name = f"epoch={step / plan.steps_per_epoch:.2f}-step={step}"
        trainer.save_checkpoint(str(run.checkpoints / name))
        if trainer.is_global_zero:
            self._record(trainer, run, {"name": name, "step": step, "score": score})
        trainer.strategy.barrier("checkpoint")

    def _record(self, trainer: Trainer, run: RunFolder, saved: dict[str, Any]) -> None:
        run_before = run.read()
        earlier = [c for c in run_before.get("checkpoints", []) if c["step"] < saved["step"]]
        checkpoints = [*earlier, saved]
        ranked = sorted((c for c in checkpoints if _is_score(c["score"])), key=self._rank)
        kept = {c["name"] for c in ranked[: self.keep]} | {saved["name"]}
        best = ranked[0] if ranked else saved
        run.update(
            {
                "checkpoints": [c for c in checkpoints if c["name"] in kept],
                "best": best["name"],
                "best_step": best["step"],
                "best_score": best["score"],
                "monitor": self.monitor,
                "last": saved["name"],
            }
        )
        for checkpoint in run_before.get("checkpoints", []):
            if checkpoint["name"] not in kept:
                trainer.strategy.remove_checkpoint(str(run.checkpoints / checkpoint["name"]))

    def _rank(self, checkpoint: dict[str, Any]) -> tuple[float, int]:
        score = float(checkpoint["score"])
        return (score if self.mode == "min" else -score, checkpoint["step"])


def _is_score(score: float | None) -> bool:
    return score is not None and math.isfinite(score)
