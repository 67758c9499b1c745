"""Callbacks that send this process a signal at a chosen instant, or give somebody else the time to."""

import os
import signal
import time
from typing import Any, Literal

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Send a signal, as the system or a user would.

    Args:
        name: Like SIGTERM.
        hook: Where: a hook of Lightning's callbacks.
        step: The optimizer steps taken by then.
        times: How often.
        fn: The verb of the trainer at that time.
    """

    def __init__(
        self,
        name: str,
        hook: Literal["step", "validation_batch", "test_batch", "train_start", "setup"] = "step",
        step: int = 0,
        times: int = 1,
        fn: str = "fit",
    ) -> None:
        self.name, self.hook, self.step, self.times, self.fn = name, hook, step, times, fn

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self._send(trainer, "setup")

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "train_start")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "step")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "validation_batch")

    def on_test_batch_end(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "test_batch")

    def _send(self, trainer: Any, hook: str) -> None:
        here = (hook, trainer.global_step, trainer.state.fn) == (self.hook, self.step, self.fn)
        if here and self.times > 0:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))
            self.times = 0


class Slow(Callback):
    """Take a while for every step.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:  # sleep() alone could be cut short by the signal
            time.sleep(0.01)


class Defect(Callback):
    """Raise after a step, or in the forward pass of the next one.

    Args:
        step: The optimizer steps taken by then.
        message: Of the exception; ``environment`` stands for every secret in it.
        where: Which of the two.
    """

    def __init__(
        self, step: int, message: str = "a defect", where: Literal["step", "forward"] = "step"
    ) -> None:
        self.step, self.where = step, where
        secrets = [value for key, value in os.environ.items() if key.endswith(("TOKEN", "KEY"))]
        self.message = " ".join(secrets) if message == "environment" else message

    def _raise(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(self.message)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.where == "step":
                self._raise()
            pl_module.model.forward = self._raise
