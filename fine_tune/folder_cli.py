"""The run folder of fit, validate and test: found or made, claimed by one process, and left in order."""

import json
import logging
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from fine_tune import run_endings, summary
from fine_tune.callbacks.loss_spikes import LossSpikes
from fine_tune.callbacks.progress import TrainingProgress
from fine_tune.callbacks.run_record import RunRecord
from fine_tune.callbacks.step_rows import StepRows
from fine_tune.callbacks.stop_signals import (
    Stopped,
    StopRequest,
    StopSignals,
)
from fine_tune.callbacks.test_openings import TestOpenings
from fine_tune.errors import UserError
from fine_tune.loggers import METRICS_FILE, MetricsCSV, default_loggers
from fine_tune.modules.run_identity import Change, run_identity
from fine_tune.provenance import check_same_run, record_origin, with_identity
from fine_tune.quiet import tee_to
from fine_tune.runs import run_folder as runs
from fine_tune.runs import slurm
from fine_tune.runs.checkpoint_io import FolderCheckpointIO
from fine_tune.runs.disk import told_by_path
from fine_tune.runs.places import (
    Place,
    check_writable,
    claim,
    find_place,
    is_first_process,
)
from fine_tune.runs.run_lock import RunLock
from fine_tune.saved_config import save_config
from fine_tune.settings_cli import SettingsCLI
from fine_tune.trainer_settings import check_trainer

log = logging.getLogger("fine_tune")
ROOT = "trainer.default_root_dir"


class FolderCLI(SettingsCLI):
    """Take prepared settings and claim a run folder, in which the verb then runs.

    Args:
        stop: Where this process listens for signals.
    """

    def __init__(self, *args: Any, stop: StopRequest, **kwargs: Any) -> None:
        self._run: runs.RunFolder | None = None
        self._lock: RunLock | None = None
        self._found_damage = self._goes_back = False
        try:
            super().__init__(*args, stop=stop, **kwargs)  # runs the verb
        except (Stopped, Exception) as error:
            self._end(error)
            raise
        finally:
            try:
                if self._lock is not None:
                    self._lock.release()  # first: a run that nobody has is not reported as running
            finally:
                if self._run is not None and is_first_process():
                    run_endings.write_report(self._run, self.settings.report)

    @property
    def run_folder(self) -> runs.RunFolder:
        """Where the run writes, once it is claimed."""
        assert self._run is not None, "the run folder is claimed in instantiate_trainer()"
        return self._run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if is_first_process():
            check_writable(self.root)
        self.check_before_weights()
        self.place = self._find_place()
        record = self.place.run.read() if self.place.run is not None else {}
        self._check_same_run()
        done = record.get("status") == "finished" and self.subcommand == "fit"
        self._is_finished = done and record.get("num_steps", 0) >= self.plan.num_steps
        run = claim(self.place, self.settings.name, self.root)
        if is_first_process() and self._lock is None:  # one that goes back has it already
            self._lock = RunLock(run.path, str(self.subcommand))
            self._check_unchanged(record)
            tee_to(run.path / "train.log")
        self._run = run  # from here on this process writes into it, its report too
        if is_first_process():
            self._record_origin()
        for note in self.place.notes:
            log.info("WARNING: %s", note)
        given = self._get(self.config_init, "trainer")
        own_loggers = self._own_loggers(run)
        self.model.starts_from_checkpoint = self.place.checkpoint is not None
        trainer = super().instantiate_trainer(
            max_epochs=1,
            check_val_every_n_epoch=None,
            val_check_interval=self.val_check_interval,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,  # ours is a callback
            logger=[*own_loggers, *_listed(given.logger)],
            plugins=[
                *_listed(given.plugins),
                FolderCheckpointIO(
                    with_identity(self.model.export, self.identity), self.place.check
                ),
            ],
            **kwargs,
        )
        log.info("precision: %s (%s)", self.settings.trainer.precision, self.why_precision)
        lines = summary.start(str(self.subcommand), self.model, self.plan, trainer, run.path)
        for line in [*lines, *summary.choices(self.chosen)]:
            log.info(line)
        if self.subcommand == "fit" and is_first_process():
            self._write_data_facts()
        return trainer

    def _find_place(self) -> Place:
        # With several processes all must agree on the checkpoint, so its files are compared before they start.
        several = check_trainer(self.settings.trainer) > 1
        configs, asked = self.settings.config or [], self.settings.get("ckpt_path")
        begun = self.run_folder if self._goes_back else None if asked else self._before_requeue()
        if begun is not None:
            configs, asked = [begun.path / "config.yaml"], "last"
        return find_place(
            str(self.subcommand),
            asked,
            name=self.settings.name,
            root=self.root,
            configs=[str(config) for config in configs],
            at_once=several or self._goes_back or self._found_damage,
        )

    def _own_loggers(self, run: runs.RunFolder) -> list[Logger]:
        metrics = run.path / METRICS_FILE
        size = metrics.stat().st_size if metrics.is_file() else 1_000
        with told_by_path(metrics, size, ROOT):
            if self.subcommand == "fit" and not self._is_finished:
                return default_loggers(run.path, keep_until=self.place.step)
            return [MetricsCSV(run.path)]

    def _check_unchanged(self, record: dict[str, Any]) -> None:
        """Refuse to go on from a place that another process has gone on from before this one had the lock."""
        run = self.place.run
        if self.subcommand == "fit" and run is not None and run.read() != record:
            raise UserError(
                f"run folder '{run.path}': another process has gone on with it meanwhile; give the command again"
            )

    def _check_same_run(self) -> None:
        self.identity: dict[str, Any] = {}
        self.changes: list[Change] = []
        if self.subcommand == "fit" and is_first_process():
            self.identity = run_identity(
                self.settings.as_dict(),
                model=self.model,
                data=self.datamodule.content,
                num_steps=self.plan.num_steps,
            )
            self.changes = check_same_run(self.place, self.identity, self.settings.allow_changes)

    def _record_origin(self) -> None:
        if self.subcommand != "fit" or self._is_finished:  # nothing of it changes
            return
        config = self.run_folder.path / "config.yaml"
        if self.changes and config.is_file():  # the run's own config goes on with the run
            earlier = config.with_name(f"config_until_step_{self.place.step}.yaml")
            if not earlier.exists():  # a run that goes back comes here again
                earlier.write_bytes(config.read_bytes())
            save_config(self._parser("fit"), self.settings, config, ckpt_path=None)
        record_origin(
            self.run_folder,
            self.place,
            self.identity,
            self.changes,
            model=self.model.model_settings.model_name_or_path,
            tokenizer=self.model.model_settings.tokenizer,
            command=self.args_given,
        )

    def _write_data_facts(self) -> None:
        file = self.run_folder.path / "data.json"
        if not file.exists():
            audit = self.datamodule.prepared.facts["audit"]
            text = json.dumps(audit, indent=1, ensure_ascii=False)
            with told_by_path(file, len(text), ROOT):
                file.write_text(text, "utf-8")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        progress = TrainingProgress(bar=self.settings.trainer.enable_progress_bar is not False)
        signals = StopSignals(self.stop)
        return super()._instantiate_trainer(
            config,
            [
                *callbacks,
                progress,
                StepRows(),
                LossSpikes(),
                TestOpenings(),
                RunRecord(signals),
                signals,
            ],
        )

    # ---- beginnings and ends

    def _before_requeue(self) -> runs.RunFolder | None:
        """Find what the same SLURM job's earlier start has saved: the command line is the same."""
        if self.subcommand != "fit" or not slurm.was_requeued():
            return None
        run = runs.version_of_job(self.root, self.settings.name, str(slurm.job_id()))
        if run is not None:
            log.info("SLURM started job %s again: going on in %s", slurm.job_id(), run.path)
        return run

    def _end(self, error: Stopped | Exception) -> None:
        if self._run is None:
            return
        trainer = getattr(self, "trainer", None)
        if isinstance(error, Stopped):
            if is_first_process():
                run_endings.say_stopped(self._run, str(self.subcommand), error, trainer)
        elif trainer is not None and self.subcommand == "fit":
            began = trainer.global_step > self.place.step
            run_endings.note_how_to_go_on(self._run, error, began=began)


def _listed(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]
