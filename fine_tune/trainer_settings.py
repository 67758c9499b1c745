"""What of Lightning's trainer is used, refused, or chosen by what the machine can do."""

from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fine_tune import strategies
from fine_tune.errors import UserError

strategies.register()

OURS_NOT_TRAINERS = {
    "max_epochs": (None, "epochs are the data's: set data.epochs"),
    "check_val_every_n_epoch": (
        None,
        "validation counts optimizer steps: set trainer.val_check_interval",
    ),
    "accumulate_grad_batches": (
        1,
        "a batch is a whole step already: set data.batch_size (rows per step) and "
        "data.max_tokens_per_micro_batch (what fits the device)",
    ),
    "limit_train_batches": (None, "set data.max_rows, or trainer.max_steps"),
    "overfit_batches": (0.0, "set data.max_rows: {train: N}"),
    "fast_dev_run": (False, "set trainer.max_steps: 3"),
    "enable_checkpointing": (
        None,
        "checkpoints are part of a run: set checkpoint.every and checkpoint.keep",
    ),
    "use_distributed_sampler": (True, "rows are spread over processes by the data module"),
}
PROFILERS = ("simple", "advanced", "pytorch", "xla")  # Lightning's, by name
MOST_DEVICES = 1_024  # of one machine; Lightning makes a list as long as the number given
SHORT_NAMES = {
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "32": "32-true",
    "64": "64-true",
}  # Lightning's


def trainer_problems(trainer: Namespace) -> list[str]:
    """Say which of the trainer's settings are not used here, or cannot be meant."""
    problems = [
        f"trainer.{key}: not used here; {instead}"
        for key, (default, instead) in OURS_NOT_TRAINERS.items()
        if trainer.get(key) not in (default, None)
    ]
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 1:
        problems.append(
            f"trainer.log_every_n_steps: must be at least 1, got {trainer.log_every_n_steps}"
        )
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        problems.append(
            f"trainer.max_steps: must be at least 1, or -1 for no limit; got {trainer.max_steps}"
        )
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        problems.append(
            f"trainer.gradient_clip_val: must not be negative, got {trainer.gradient_clip_val}"
        )
    if str(trainer.devices).isdecimal() and int(trainer.devices) > MOST_DEVICES:
        problems.append(f"trainer.devices: must be at most {MOST_DEVICES:,}, got {trainer.devices}")
    strategy = str(trainer.strategy)
    if strategy == "fsdp" or strategy.startswith("fsdp_"):
        problems.append(
            f"trainer.strategy: '{strategy}' keeps weights in flat pieces, which no other strategy's checkpoints fit; "
            f"use {strategies.FSDP2}"
        )
    if isinstance(trainer.profiler, str) and trainer.profiler.lower() not in PROFILERS:
        problems.append(
            f"trainer.profiler: '{trainer.profiler}' is not known; use {', '.join(PROFILERS)}"
        )
    if not isinstance(trainer.val_check_interval, int | float | None):
        problems.append(
            "trainer.val_check_interval: give optimizer steps, or a share of a data epoch"
        )
    return problems


def choose_precision(accelerator: str, asked: Any = None) -> tuple[Any, str]:
    """Choose the precision, as asked or by what the device can do, and say why.

    Args:
        accelerator: The trainer's.
        asked: The trainer's precision; None where nobody asked for one.
    """
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    on_mps = accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available()
    if str(asked) in ("16", "16-mixed") and not on_gpu and not on_mps:
        return "bf16-mixed", f"{asked} asked; a CPU computes it in bfloat16"
    if asked is not None:
        return SHORT_NAMES.get(str(asked), asked), "as asked"
    if not on_gpu:
        return "32-true", f"the default on {'Apple silicon' if on_mps else 'a CPU'}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", "the GPU computes in bfloat16"
    return "16-mixed", "the GPU has no bfloat16"


def check_trainer(trainer: Namespace) -> int:
    """Try the trainer's settings, without the classes among them, before anything is written.

    Returns:
        The number of processes the run will have.

    Raises:
        UserError: What Lightning says of them, and what this machine has.
    """
    asked = {
        key: value
        for key, value in vars(trainer).items()
        if key not in ("callbacks", "logger", "plugins", "profiler", "default_root_dir")
        and not isinstance(value, Namespace)
    }
    asked |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    asked |= {"max_epochs": 1, "val_check_interval": None, "enable_checkpointing": False}
    try:
        return int(Trainer(**asked).world_size)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"trainer: these settings cannot be had here: {told}; "
            f"this machine has a CPU and {torch.cuda.device_count()} CUDA device(s)"
        ) from error


def validation_steps(interval: Any, steps_per_epoch: int) -> Any:
    """Return the optimizer steps between validations: as given, or a share of a data epoch (default: all of it)."""
    if interval is None:
        return steps_per_epoch
    if isinstance(interval, float):
        if not 0 < interval <= 1:
            raise UserError(
                f"trainer.val_check_interval: a share of a data epoch lies in (0, 1], got {interval}"
            )
        return max(1, round(interval * steps_per_epoch))
    if isinstance(interval, int) and interval < 1:
        raise UserError(
            f"trainer.val_check_interval: must be at least 1 optimizer step, got {interval}"
        )
    return interval
