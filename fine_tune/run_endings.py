"""What a run leaves when it ends, however it ends: its report, and how to go on."""

import logging
import traceback
from typing import Literal

from lightning.pytorch import Trainer

from fine_tune import summary
from fine_tune.callbacks.stop_signals import Stopped
from fine_tune.callbacks.test_openings import TestOpenings
from fine_tune.errors import in_brief
from fine_tune.exits import user_error_behind
from fine_tune.runs import slurm
from fine_tune.runs.run_folder import RunFolder

log = logging.getLogger("fine_tune")


def write_report(run: RunFolder, language: Literal["en", "id"] | None) -> None:
    """Write what became of the run beside it, unless nobody wants it; that it cannot be written stops nobody."""
    if language is None:
        return
    try:
        from fine_tune.report.write import write_report  # most of a second to import

        log.info("report: %s", write_report(run.path, language))
    except Exception as error:
        told = in_brief(f"{type(error).__name__}: {error}")
        log.info("WARNING: no report was written (%s)", told)


def say_stopped(run: RunFolder, verb: str, stopped: Stopped, trainer: Trainer | None) -> None:
    """Say how to go on after a signal; ask SLURM for a requeue where that was its signal."""
    callbacks = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
    opened = any(isinstance(c, TestOpenings) and c.has_opened for c in callbacks)
    for line in summary.stopped(run, verb, str(stopped), opened=opened):
        log.info(line)
    ended = run.read().get("status") == "finished"
    if stopped.asks_for_requeue and verb == "fit" and not ended and trainer is not None:
        slurm.requeue(trainer)


def note_how_to_go_on(run: RunFolder, error: Exception, *, began: bool) -> None:
    """Add the resume command below an error's traceback, if it is a defect or training had begun."""
    if user_error_behind(error) is None or began:
        only_file = {"only_file": True}
        log.info("%s", "".join(traceback.format_exception(error)), extra=only_file)
        error.add_note(summary.resume(run))
