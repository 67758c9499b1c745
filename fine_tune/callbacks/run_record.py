"""What became of the run: status, environment and results, kept in the run folder's ``run.json``."""

import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import plan_of
from fine_tune.callbacks.stop_signals import Stopped, StopSignals
from fine_tune.runs import slurm
from fine_tune.runs.run_folder import run_of

PACKAGES = (
    "fine-tune",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "bitsandbytes",
)


class RunRecord(Callback):
    """Record when a run starts, stops, fails or ends, and what it measured.

    ``finished`` means the planned steps, with the validation that belongs to the last one, or early stopping.

    Args:
        signals: Knows whether a signal left a validation undone.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        if trainer.is_global_zero:
            plan = plan_of(trainer)
            run = run_of(trainer)
            starts = [
                *run.read().get("starts", []),
                {"time": _now(), "from_step": trainer.global_step},
            ]
            run.update(
                {
                    "status": "running",
                    "starts": starts,
                    "num_steps": plan.num_steps,
                    "steps_per_epoch": plan.steps_per_epoch,
                    "num_rows": plan.num_rows,
                    "num_tokens": plan.num_tokens,
                    "environment": environment(),
                    "slurm_job": slurm.job_id(),
                }
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopped_early = any(
            getattr(c, "stopped_epoch", 0) or _patience_out(c)
            for c in trainer.early_stopping_callbacks
        )
        done = trainer.global_step >= plan_of(trainer).num_steps
        whole = (done or stopped_early) and not self.signals.validation_due
        self._end(trainer, "finished" if whole else "stopped")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run killed after its last save: Lightning finds no step left, and calls no other hook."""
        if not self._start and trainer.global_step >= plan_of(trainer).num_steps:
            self._start = time.monotonic()
            self._end(trainer, "finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn != "fit":
            return
        status = "stopped" if isinstance(exception, Stopped | KeyboardInterrupt) else "failed"
        if self._start:
            self._end(trainer, status)
        elif trainer.is_global_zero and "status" not in run_of(trainer).read():  # of a new run
            run_of(trainer).update({"status": status, "step": 0})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._result(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._result(trainer, "validation")

    def _end(self, trainer: Trainer, status: str) -> None:
        if trainer.is_global_zero:
            seconds = run_of(trainer).read().get("seconds", 0.0) + time.monotonic() - self._start
            run_of(trainer).update(
                {"status": status, "step": trainer.global_step, "seconds": round(seconds, 3)}
            )

    def _result(self, trainer: Trainer, split: str) -> None:
        if trainer.is_global_zero:
            run = run_of(trainer)
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "/" in name
            }
            checkpoint = Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else None
            entry = {"time": _now(), "split": split, "checkpoint": checkpoint, "metrics": metrics}
            run.update({"results": [*run.read().get("results", []), entry]})


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that produced a run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_commit": _git_commit(),
        "verb": sys.argv[1] if len(sys.argv) > 1 else "",
    }


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _patience_out(callback: Any) -> bool:
    return getattr(callback, "wait_count", 0) >= getattr(callback, "patience", 1) and getattr(
        callback, "enabled", True
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
