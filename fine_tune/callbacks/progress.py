"""The progress bar in a terminal, and a plain line per logging interval everywhere else and in train.log."""

import logging
import sys
import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fine_tune.batches import log_interval, plan_of

log = logging.getLogger("fine_tune")


class TrainingProgress(Callback):
    """Show loss, learning rate, tokens per second, memory and time left.

    Args:
        bar: Draw a bar in a terminal; without it, and anywhere else, a plain line per logging interval.
    """

    def __init__(self, bar: bool = True) -> None:
        self.wants_bar = bar
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start = 0.0
        self._first_step = 0
        self._rate = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._first_step = time.perf_counter(), trainer.global_step
        if self.wants_bar and sys.stdout.isatty() and trainer.is_global_zero:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(file=sys.stdout),
                transient=True,
            )
            self._task = self._bar.add_task(
                "training",
                total=plan_of(trainer).num_steps,
                completed=trainer.global_step,
                status="",
            )
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % log_interval(trainer) == 0 and trainer.is_global_zero:
            self._report(trainer, step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.is_global_zero and not trainer.sanity_checking:
            values = trainer.callback_metrics
            measured = [name for name in values if name.startswith("val/")]
            shown = "  ".join(f"{name} {float(values[name]):.4g}" for name in measured)
            log.info("step %d  %s", trainer.global_step, shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _report(self, trainer: Trainer, step: int) -> None:
        plan = plan_of(trainer)
        values = trainer.callback_metrics
        left = (
            (time.perf_counter() - self._start)
            / max(1, step - self._first_step)
            * (plan.num_steps - step)
        )
        rate = values.get("perf/tokens_per_second")
        loss = values.get("train/loss")
        status = (
            f"loss {float(loss) if loss is not None else float('nan'):.4f}  "
            f"lr {float(values.get('lr', 0)):.2e}  "
            f"{float(rate) if rate is not None else 0:,.0f} tokens/s  "
            f"{_memory_gib():.2f} GiB  {format_seconds(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        line = f"step {step}/{plan.num_steps}  epoch {step / plan.steps_per_epoch:.2f}  {status}"
        log.info(line, extra={"only_file": self._bar is not None})

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def format_seconds(seconds: float) -> str:
    """Write a duration like ``1 h 02 min``, ``3 min 05 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
