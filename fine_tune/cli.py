"""The command line of fit, validate and test: LightningCLI with the project's guards, folders and wording."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from fine_tune import summary
from fine_tune.callbacks.precision_fallback import PrecisionFallback
from fine_tune.callbacks.stop_signals import (
    Stopped,
    StopRequest,
    end_with_parent,
)
from fine_tune.errors import DamagedCheckpoint, GoBack, UserError
from fine_tune.exits import exit_code
from fine_tune.folder_cli import FolderCLI
from fine_tune.runs.checkpoint import begin_check
from fine_tune.runs.places import (
    PARENT_VARIABLE,
    RUN_VARIABLE,
    is_first_process,
)
from fine_tune.runs.results import own_results
from fine_tune.settings_cli import run_cli

log = logging.getLogger("fine_tune")
MAX_GOING_BACK = 3


class FineTuneCLI(FolderCLI):
    """Train or measure in the run folder, from a whole checkpoint where one is asked for."""

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Train, validate the best weights, and test them if asked to."""
        start, measured = time.monotonic(), set()
        if self._is_finished:
            log.info("this run is finished; extend it with --data.epochs or --trainer.max_steps")
            measured = self._measured_splits()
        else:
            self._from_whole_checkpoint(self._fit)
            if self.stop.agreed(self.trainer):
                raise Stopped(self.stop.signum)
        seconds = time.monotonic() - start
        splits = self._measure_best(measured)
        if self.trainer.is_global_zero:
            targets = dict(self.settings.targets)
            told = summary.end_of_fit(self.run_folder, seconds, targets)
            if self._is_finished:
                told = summary.evaluation(self.run_folder, len(splits)) if splits else []
                told += summary.reached(self.run_folder, targets)
            for line in told:
                log.info(line)

    def _measured_splits(self) -> set[str]:
        """Name the splits that a finished run has results of: a kill may have come before the best was validated."""
        best, results = self.run_folder.checkpoint("best"), own_results(self.run_folder.read())
        return {r["split"] for r in results if best is None or r.get("checkpoint") == best.name}

    def _measure_best(self, measured: set[str]) -> list[str]:
        """Measure the best weights on the validation split, and on the test split if asked to; return on which."""
        best = self.trainer.strategy.broadcast(self.run_folder.checkpoint("best"))
        done = self.trainer.strategy.broadcast(self.run_folder.read().get("status") == "finished")
        splits = [
            s for s in ("validation", "test") if s in self.plan.num_rows and s not in measured
        ]
        if not self.settings.test_at_end or not done:
            splits = [split for split in splits if split != "test"]
        if self.settings.test_at_end and not done:
            log.info("the test split stays sealed: the run stopped before its last step")
        if best is None:
            return []
        given: dict[str, Any] = {"ckpt_path": str(best.resolve()), "verbose": False}
        given["datamodule"] = self.datamodule
        if "validation" in splits:
            self.trainer.validate(self.model, **given)
        if "test" in splits:
            begin_check(best.resolve(), at_once=True)  # a damaged one opens no test split
            self.trainer.test(self.model, **given)
        return splits

    def _from_whole_checkpoint(self, start: Callable[[], None]) -> None:
        """Start from the checkpoint asked for; one that proves damaged while it is read is passed over."""
        try:
            start()
        except DamagedCheckpoint:
            if self.place.checkpoint is None or self._found_damage:
                raise
            self._found_damage = True
            self.instantiate_classes()
            start()

    def _fit(self) -> None:
        """Train; where a guard asks for it, go on from the newest checkpoint, perhaps in a lower precision."""
        precision: str | None = None
        for _ in range(MAX_GOING_BACK):
            try:
                checkpoint = _text(self.place.checkpoint)
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint)
                return
            except GoBack as back:
                reason, precision = back.reason, back.precision or precision
            self._go_back(reason)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, PrecisionFallback):
                    callback.go_on_in(precision)
        raise UserError(f"{reason}; the run went back {MAX_GOING_BACK} times, and it happens again")

    def _go_back(self, reason: str) -> None:
        """Begin again from the newest checkpoint of this run that is whole."""
        taken, self._goes_back = self.trainer.global_step, True
        # the first process has written the last of them by now; others may not know which version it took
        self._run = self.trainer.strategy.broadcast(self._run)
        os.environ[RUN_VARIABLE] = str(self.run_folder.path)
        try:
            self.instantiate_classes()
        except UserError as error:
            told = "; ".join(error.problems)
            raise UserError(f"{reason}; there is no checkpoint to go back to: {told}") from error
        assert self.place.checkpoint is not None
        log.info(
            "WARNING: %s; going back to %s: %d steps are redone",
            reason,
            self.place.checkpoint.name,
            taken - self.place.step,
        )

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Measure the checkpoint on the validation split."""
        self._from_whole_checkpoint(lambda: self._measure(self.trainer.validate))

    def test(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Measure the checkpoint on the test split, which a damaged one does not open."""
        self._from_whole_checkpoint(self._test)

    def _test(self) -> None:
        if self.place.check is not None:
            self.place.check.wait()
        self._measure(self.trainer.test)

    def _measure(self, evaluate: Callable[..., Any]) -> None:
        evaluate(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=_text(self.place.checkpoint),
            verbose=False,
        )
        if self.trainer.is_global_zero:
            for line in summary.evaluation(self.run_folder):
                log.info(line)


def main(args: list[str] | None = None) -> int:
    """Run fit, validate or test; return the exit code: 2 for what the user can fix."""
    if not is_first_process() and RUN_VARIABLE in os.environ:
        end_with_parent()
    elif PARENT_VARIABLE in os.environ:
        end_with_parent(int(os.environ[PARENT_VARIABLE]))
    stop = StopRequest()
    return exit_code(
        lambda: run_cli(FineTuneCLI, sys.argv[1:] if args is None else args, stop), stop
    )


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None
