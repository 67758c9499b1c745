"""When to save, what to keep: the last checkpoint and the best ones, named by true epoch and step."""

import logging
import time
from datetime import datetime
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fine_tune.batches import StepFailure, plan_of
from fine_tune.callbacks.precision_fallback import weights_are_finite
from fine_tune.callbacks.stop_signals import validation_is_due
from fine_tune.errors import RunStopped, UserError
from fine_tune.ranks import any_rank
from fine_tune.runs.checkpoint import remove_checkpoint, remove_leftovers
from fine_tune.runs.checkpoint_io import FolderCheckpointIO, Saving
from fine_tune.runs.run_folder import RunFolder, run_of
from fine_tune.runs.stored_checkpoints import checkpoint_name, ranked, stored

log = logging.getLogger("fine_tune")
WAIT_WORTH_TELLING = 0.5  # seconds


class Checkpoints(Checkpoint):
    """Save the run so that it can be resumed, and so that its best weights are kept.

    A checkpoint is written every ``every`` steps, after each validation, and after the last step. Training stops for a
    copy of its state; the writing goes on beside it. Only a run's first checkpoint is waited for.

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
        self._saved_step: int | None = None  # at first where this process began; None before
        self._is_first = True

    # ---- when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        run = run_of(trainer)
        if trainer.is_global_zero:
            self._take_stock(run, trainer.global_step)
        self._is_first = trainer.strategy.broadcast(not run.read().get("checkpoints"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.world_size == 1 and _io(trainer).has_failed:
            self._settle(trainer)  # several ranks meet at the next save
        step, plan = trainer.global_step, plan_of(trainer)
        every = plan.steps_per_epoch if self.every == "epoch" else self.every
        due = step % every == 0 or step >= plan.num_steps or trainer.should_stop
        if due and not validation_is_due(trainer):
            self._save(trainer, pl_module, score=None)

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
        self._save(trainer, pl_module, score=float(trainer.callback_metrics[self.monitor]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)  # before the run is recorded as finished

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the write in flight end, and save what is still good; the exception stays the one that is shown.

        Only steps of this process are worth a save, and only if all ranks are here: a save is a collective call.
        """
        stopped = exception if isinstance(exception, RunStopped) else None
        together = trainer.world_size == 1 or (stopped is not None and stopped.on_all_ranks)
        try:
            begun = self._saved_step is not None and trainer.global_step > self._saved_step
            if stopped is not None and together and begun:
                self._save(trainer, pl_module, score=None)
            if together:  # a rank that ended first would take the one that writes along
                self._settle(trainer)
            else:
                _io(trainer).wait()
        except Exception as error:
            log.error("the last checkpoint was not written: %s", error)

    # ---- how

    def _save(self, trainer: Trainer, pl_module: Any, score: float | None) -> None:
        step, plan = trainer.global_step, plan_of(trainer)
        if step == self._saved_step:
            return
        if any_rank(not weights_are_finite(pl_module), pl_module.device, trainer.world_size):
            # a guard ends the run, or sends it back to the checkpoint that such weights are not written over
            pl_module.handle(StepFailure("non_finite", "step", step))
        self._saved_step = step
        started = time.perf_counter()
        self._settle(trainer)
        waited = time.perf_counter() - started
        if waited > WAIT_WORTH_TELLING:
            log.info("checkpoint: waited %.1f s until the one before was written", waited)
        run = run_of(trainer)
        saved = {"name": checkpoint_name(step / plan.steps_per_epoch, step), "step": step}
        saved["score"] = score
        how = Saving(
            facts={"score": score, "monitor": self.monitor},
            written=lambda measured: self._record(run, {**saved, **measured}),
            background=not self._is_first,
            started=started,
        )
        trainer.save_checkpoint(str(run.checkpoints / str(saved["name"])), storage_options=how)
        if self._is_first:  # a run that cannot save is told now, and from here on it can be resumed
            self._settle(trainer)
            self._is_first = False

    def _settle(self, trainer: Trainer) -> None:
        """Wait for the write in flight; if it failed, every rank stops with its error."""
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                _io(trainer).wait()
            except Exception as raised:
                error = raised
        problems: tuple[str, ...] | None = (str(error),) if error is not None else None
        if isinstance(error, UserError):
            problems = error.problems
        problems = trainer.strategy.broadcast(problems)
        if error is not None:
            raise error
        if problems is not None:
            raise UserError(*problems)

    # ---- what is kept

    def _take_stock(self, run: RunFolder, step: int) -> None:
        """Clear up after a killed save, and record the whole checkpoint it may have left unrecorded."""
        record = run.read()
        remove_leftovers(run.checkpoints)
        listed = [c["name"] for c in record.get("checkpoints", [])]
        for name in _still_there(run, record):
            if name not in listed:
                remove_checkpoint(run.checkpoints / name)
        for found in stored(run):
            if found["name"] not in listed and found["step"] == step:  # the run goes on from it
                self._record(run, found)

    def _record(self, run: RunFolder, saved: dict[str, Any]) -> None:
        """Name the new checkpoint in the record, then remove those it replaces."""
        record = run.read()
        before = record.get("checkpoints", [])
        checkpoints = [*(c for c in before if c["step"] < saved["step"]), saved]
        by_score = ranked(checkpoints, self.mode)
        kept = {c["name"] for c in by_score[: self.keep]} | {saved["name"]}
        best = by_score[0] if by_score else saved
        rotated = [c["name"] for c in before if c["name"] not in kept]
        rotated += [name for name in _still_there(run, record) if name not in kept]
        run.update(
            {
                "checkpoints": [c for c in checkpoints if c["name"] in kept],
                "rotated": rotated,
                "best": best["name"],
                "best_step": best["step"],
                "best_score": best.get("score"),
                "monitor": self.monitor,
                "mode": self.mode,
                "last": saved["name"],
                "last_saved": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
        )
        for name in rotated:
            try:
                remove_checkpoint(run.checkpoints / name)
            except OSError as error:
                log.info("WARNING: %s is not removed: %s", run.checkpoints / name, error.strerror)


def _still_there(run: RunFolder, record: dict[str, Any]) -> list[str]:
    return [name for name in record.get("rotated", []) if (run.checkpoints / name).is_dir()]


def _io(trainer: Trainer) -> FolderCheckpointIO:
    plugin = trainer.strategy.checkpoint_io
    assert isinstance(plugin, FolderCheckpointIO)
    return plugin
