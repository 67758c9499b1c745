"""Stop when asked to: SIGTERM, SLURM's SIGUSR1 and Ctrl-C end a run at its next step boundary, saved."""

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import plan_of
from fine_tune.errors import RunStopped
from fine_tune.runs.places import is_first_process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the run.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for what a cluster sends; the processes a launcher watches end without a fault."""
        if not is_first_process():
            return 0  # anything else makes the launcher kill the first one, which may not be done
        return 130 if self.signum == signal.SIGINT else 143

    @property
    def asks_for_requeue(self) -> bool:
        """Whether it is the signal that SLURM sends before a job's time is over."""
        return self.signum == signal.SIGUSR1


class StopRequest:
    """Listens for signals while entered as a context, in the main thread.

    A signal raises ``Stopped`` at once, but while training ``waits`` it is noted for the next step boundary. A Ctrl-C
    after an earlier signal raises at once in any case, and one more ends the process there and then.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.waits = False
        self._raised = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Take the signals, also from the handlers that Lightning's trainer installs when it starts a loop."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any process of the run was asked to stop; a collective call with one answer on all of them."""
        if trainer.world_size > 1:
            signum = torch.tensor(self.signum, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(signum)
        return self.signum != 0

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._on_signal_in_worker(signum)
        elif self.signum and signum != signal.SIGINT:
            pass  # a stop is under way
        elif self._raised:
            os._exit(130)
        elif self.signum or not self.waits:
            self.signum, self._raised = signum, True
            raise Stopped(signum)
        else:
            self.signum = signum
            if is_first_process():
                hint = "; once more stops now" if signum == signal.SIGINT else ""
                name = signal.Signals(signum).name
                os.write(2, f"\n{name}: saving at the next step boundary{hint}\n".encode())

    def _on_signal_in_worker(self, signum: int) -> None:
        if signum == signal.SIGTERM:  # how a pool ends its workers; the rest is for the parent
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


class StopSignals(Callback):
    """End training at the next step boundary after a signal, saved, without validating first.

    Pre-emption gives seconds, so what would follow the step is left out: a validation that was due (or had begun) is
    run when the run is taken up again, so that its records are those of a run that was never stopped. The signals
    answer on every process when they reach one.

    SLURM: ask for a signal before the time limit, ``#SBATCH --signal=USR1@60 --requeue``. On SIGUSR1, the run is saved
    and the job asks for its own requeue (``scontrol``), as Lightning's trainer would, except that Lightning saves from
    inside the signal handler, between any two instructions. The requeued job, the same command line, goes on in
    the run folder of its first start. SIGTERM (pre-emption, which requeues by itself, or ``scancel``) only saves and
    exits with 143.

    Args:
        stop: Where the process listens for signals.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.validation_due = False
        self._saved = False
        self._catches_up = False
        self._max_steps = -1

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._max_steps = trainer.max_steps
        if trainer.state.fn == "fit" and state.get("validation_due"):
            self.validation_due = True
            # at its last step, Lightning would return before on_train_start; the loader ends the run as well
            trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.listen()
        self.stop.waits = True
        if self.validation_due:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self.validation_due = False
            if validation_is_due(trainer):
                self._catch_up(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.stop.agreed(trainer):
            self.validation_due = validation_is_due(trainer)
            _save(trainer, pl_module)
            self._saved = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        if self._saved:  # the step before is logged by now
            raise Stopped(self.stop.signum)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self.stop.agreed(trainer):
            return
        if not self._catches_up:  # else it is on disk already
            self.validation_due = True
            _save(trainer, pl_module)
        raise Stopped(self.stop.signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.waits = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.stop.waits = False
        if isinstance(exception, RunStopped) and trainer.state.fn == "fit" and trainer.validating:
            self.validation_due = True  # all of it: what it had counted is not saved

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.listen()

    def _catch_up(self, trainer: Trainer) -> None:
        self._catches_up = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # all of it, wherever it was stopped
        trainer.validating = True
        loop.run()
        trainer.training = True
        self._catches_up = False


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the step that was just taken, unless a signal ends the run."""
    plan, step = plan_of(trainer), trainer.global_step
    if "validation" not in plan.num_rows or not trainer.enable_validation:
        return False
    interval = trainer.val_check_batch
    at_interval = bool(interval) and interval != math.inf and step % int(interval or 1) == 0
    return at_interval or trainer.should_stop or step >= plan.num_steps


def _save(trainer: Trainer, pl_module: LightningModule) -> None:
    """Show the checkpoint callbacks a step's end that is the last one, with no validation to wait for."""
    trainer.limit_val_batches = 0
    before, trainer.should_stop = trainer.should_stop, True
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_batch_end(trainer, pl_module, None, None, 0)
    trainer.should_stop = before  # left at True, Lightning would log a step between two intervals


def end_with_parent(parent: int | None = None) -> None:
    """End this process when the one that started it is gone: no collective call tells a waiting rank at once.

    Args:
        parent: Its number; None: whoever it is now.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
