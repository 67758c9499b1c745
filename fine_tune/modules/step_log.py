"""What is logged of an optimizer step, tokens per second without the time of validations among it."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fine_tune.batches import log_interval
from fine_tune.modules.gradients import StepGradient

SHOWN_RANKS = 16  # of more of them only the mean is logged

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule


class Throughput:
    """A stopwatch over trained tokens, of all ranks; and how long ranks wait for the one that has most of them."""

    def __init__(self) -> None:
        self._num_tokens, self._start, self._pause_start = np.zeros(1), 0.0, 0.0
        self._longest = 0.0

    def start(self) -> None:
        """Count from now."""
        self._num_tokens, self._longest = np.zeros(1), 0.0
        self._start = time.perf_counter()

    def add(self, num_tokens: list[float]) -> None:
        """Count the tokens of a step, of each rank."""
        self._num_tokens = self._num_tokens + np.array(num_tokens)
        self._longest += max(num_tokens)

    def idle_shares(self) -> dict[str, float]:
        """Return the share of the time that ranks wait for others, if time goes with tokens: the mean, and of each."""
        ranks = len(self._num_tokens)
        if ranks == 1 or not self._longest:
            return {}
        shares = 1 - self._num_tokens / self._longest
        each = {f"perf/idle_share_rank_{rank}": float(share) for rank, share in enumerate(shares)}
        return {"perf/idle_share": float(shares.mean()), **(each if ranks <= SHOWN_RANKS else {})}

    def pause(self) -> None:
        """Stop the watch until ``go_on``."""
        self._pause_start = time.perf_counter()

    def paused_seconds(self) -> float:
        """Return the seconds since ``pause``."""
        return time.perf_counter() - self._pause_start

    def go_on(self) -> None:
        """Leave out the time since ``pause``."""
        self._start += time.perf_counter() - self._pause_start

    def take(self) -> float:
        """Return the tokens per second since the last time, and start again."""
        rate = float(self._num_tokens.sum()) / (time.perf_counter() - self._start)
        self.start()
        return rate


def log_step(module: "StepModule", gradient: StepGradient, throughput: Throughput) -> None:
    """Log an optimizer step: its number from 1, the learning rate it is taken with, its loss and metrics.

    Args:
        module: Whose step.
        gradient: What its rows gave.
        throughput: Read where a row of ``metrics.csv`` is written.
    """
    trainer = module.trainer
    step = trainer.global_step + 1
    values: dict[str, Any] = {
        "step": float(step),
        "epoch": step / module.plan.steps_per_epoch,
        "train/loss": gradient.loss,
        **{f"train/{name}": value for name, value in gradient.metrics.items()},
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
    }
    if step % log_interval(trainer) == 0:
        values |= throughput.idle_shares()
        values["perf/tokens_per_second"] = throughput.take()
        values |= {f"train_{name}": value for name, value in module.interval_metrics().items()}
        if module.device.type == "cuda":
            values["perf/vram_peak_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
    # Lightning would copy a plain number to the device, and wait until it is there
    module.log_dict({name: torch.as_tensor(value) for name, value in values.items()})
