"""What became of the run: status, environment and results, kept in the run folder's ``run.json``."""

import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import plan_of
from fine_tune.callbacks.stop_signals import Stopped, StopSignals
from fine_tune.device_energy import EnergyMeter, energy_meter
from fine_tune.device_memory import device_name
from fine_tune.runs import slurm
from fine_tune.runs.row_losses import write_row_losses
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
        self._has_begun = False  # whether the last of the record's starts is this one
        self._energy: EnergyMeter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        if trainer.is_global_zero:
            self._energy = energy_meter(devices(trainer))
            plan, (total, trained) = plan_of(trainer), cast(Any, pl_module).num_weights()
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
                    "test_hash": plan.test_hash,
                    "num_tokens": plan.num_tokens,
                    "num_supervised": plan.num_supervised,
                    "model": {"parameters": total, "trained": trained},
                    "environment": {**environment(), **of_devices(trainer)},
                    "slurm_job": slurm.job_id(),
                }
            )

            self._has_begun = True

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
        self._result(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._result(trainer, pl_module, "validation")

    def _end(self, trainer: Trainer, status: str) -> None:
        if trainer.is_global_zero:
            known = run_of(trainer).read()
            taken_now = time.monotonic() - self._start
            facts: dict[str, Any] = {"status": status, "step": trainer.global_step}
            facts["seconds"] = round(known.get("seconds", 0.0) + taken_now, 3)
            if self._has_begun and (starts := known.get("starts", [])):
                ended = {"to_step": trainer.global_step, "seconds": round(taken_now, 3)}
                facts["starts"] = [*starts[:-1], {**starts[-1], **ended}]
            used = self._energy.watt_hours() if self._energy is not None else None
            if used is not None:
                before = known.get("energy", {}).get("watt_hours", 0.0)
                facts["energy"] = {"watt_hours": round(before + used, 4)}
            run_of(trainer).update(facts)

    def _result(self, trainer: Trainer, pl_module: Any, split: str) -> None:
        if trainer.is_global_zero:
            run = run_of(trainer)
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "/" in name
            }
            checkpoint = Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else None
            entry: dict[str, Any] = {"time": _now(), "split": split, "checkpoint": checkpoint}
            entry |= {"metrics": metrics, "intervals": pl_module.intervals}
            if split == "test":  # of the run's own rows, or of others
                plan = plan_of(trainer)
                entry |= {"test_hash": plan.test_hash, "num_rows": plan.num_rows["test"]}
                entry["counted"] = {name: list(pair) for name, pair in pl_module.counted.items()}
            run.update({"results": [*run.read().get("results", []), entry]})
            if split == "validation" and pl_module.measured_rows is not None:
                write_row_losses(run, pl_module.measured_rows)


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
        **_git_commit(),
        "verb": sys.argv[1] if len(sys.argv) > 1 else "",
    }


def devices(trainer: Trainer) -> list[torch.device]:
    """Return this node's devices that a trainer computes on."""
    kind = trainer.strategy.root_device.type
    return [
        torch.device(kind, i) if kind == "cuda" else torch.device(kind) for i in trainer.device_ids
    ]


def of_devices(trainer: Trainer) -> dict[str, Any]:
    """Name a trainer's devices, and count them over all nodes."""
    names = [device_name(device) for device in devices(trainer)]
    return {"devices": list(dict.fromkeys(names)), "num_devices": trainer.world_size}


def _git_commit() -> dict[str, Any]:
    """Name the commit of the working directory, and say so if its files are not those of the commit."""
    commit = _git("rev-parse", "HEAD")
    # No lock: a commit made in another terminal meanwhile goes through.
    changes = commit and _git("--no-optional-locks", "status", "--porcelain", "-uno")
    return {"git_commit": commit, **({"git_dirty": True} if changes else {})}


def _git(*args: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *args], capture_output=True, text=True, timeout=5, check=False
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
