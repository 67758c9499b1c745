"""The command line of fit, validate and test: LightningCLI with the project's guards, folders and wording."""

import enum
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fine_tune.quiet import quiet_libraries, start_console, stop_tee, tee_to

quiet_libraries()

from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402

from fine_tune import run_folder as runs  # noqa: E402
from fine_tune import slurm, summary  # noqa: E402
from fine_tune.batches import Choice, DataPlan  # noqa: E402
from fine_tune.callbacks.checkpoints import Checkpoints  # noqa: E402
from fine_tune.callbacks.early_stopping import EarlyStopping  # noqa: E402
from fine_tune.callbacks.generations import Generations  # noqa: E402
from fine_tune.callbacks.precision_fallback import PrecisionFallback  # noqa: E402
from fine_tune.callbacks.progress import TrainingProgress  # noqa: E402
from fine_tune.callbacks.run_record import RunRecord  # noqa: E402
from fine_tune.callbacks.step_rows import StepRows  # noqa: E402
from fine_tune.callbacks.stop_signals import (  # noqa: E402
    Stopped,
    StopRequest,
    StopSignals,
    end_with_parent,
)
from fine_tune.callbacks.test_openings import TestOpenings  # noqa: E402
from fine_tune.callbacks.vram_guard import VRAMGuard  # noqa: E402
from fine_tune.checkpoint import global_step  # noqa: E402
from fine_tune.checkpoint_io import FolderCheckpointIO  # noqa: E402
from fine_tune.config_check import (  # noqa: E402
    asks_for_help,
    check_settings,
    innermost,
    with_key,
)
from fine_tune.errors import GoBack, UserError, nearest  # noqa: E402
from fine_tune.loggers import MetricsCSV, default_loggers  # noqa: E402
from fine_tune.modules.run_identity import Change, run_identity  # noqa: E402
from fine_tune.places import (  # noqa: E402
    RUN_VARIABLE,
    check_writable,
    claim,
    find_place,
    is_first_process,
)
from fine_tune.provenance import check_same_run, record_origin, with_identity  # noqa: E402
from fine_tune.run_lock import RunLock  # noqa: E402
from fine_tune.settings import take_templates  # noqa: E402
from fine_tune.trainer_settings import (  # noqa: E402
    check_trainer,
    choose_precision,
    trainer_problems,
    validation_steps,
)

log = logging.getLogger("fine_tune")
FORCED_CALLBACKS = {
    "precision_fallback": PrecisionFallback,
    "vram_guard": VRAMGuard,
    "checkpoint": Checkpoints,
    "early_stopping": EarlyStopping,
    "generations": Generations,
}
HELP_HINT = "Options of the model and the data: --model.help fine_tune.modules.SFT, --data.help fine_tune.data.SFTData"
MONITORED = ("val/loss", "val/perplexity", "val/token_accuracy")
MAX_GOING_BACK = 3


CLI = TypeVar("CLI", bound="FineTuneCLI")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors reach the user as one clean line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        raise UserError(with_key(message)) from ex


class RunConfig(SaveConfigCallback):
    """Write the resolved settings to ``config.yaml`` in the run folder, once."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = runs.run_of(trainer).path / "config.yaml"
        if trainer.is_global_zero and not file.exists():
            save_config(self.parser, self.config, file)


class FineTuneCLI(LightningCLI):
    """Parse, check everything that needs no weights, claim a run folder, and go.

    Args:
        stop: Where this process listens for signals.
    """

    def __init__(self, *args: Any, stop: StopRequest, **kwargs: Any) -> None:
        self.stop = stop
        self._run: runs.RunFolder | None = None
        self._lock: RunLock | None = None
        try:
            super().__init__(*args, **kwargs)  # runs the verb
        except Stopped as stopped:
            self._say_stopped(stopped)
            raise
        except Exception as error:
            self._note_how_to_go_on(error)
            raise
        finally:
            if self._lock is not None:
                self._lock.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        evaluation = {"model", "dataloaders", "datamodule", "verbose", "weights_only"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": fit, "validate": evaluation, "test": evaluation}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str,
            default="run",
            help="Name of the run: lightning_logs/<name>/version_N.",
        )
        parser.add_argument(
            "--test_at_end",
            type=bool,
            default=False,
            help="Measure the test split once, after fit's last step.",
        )
        parser.add_argument(
            "--targets",
            type=dict[str, float],
            default={},
            help="Metrics to reach, like {val/loss: 1.5}; the end says reached or missed.",
        )
        parser.add_argument(
            "--allow_changes",
            type=bool,
            default=False,
            help="Resume although settings or data differ from the checkpoint's; every difference is recorded.",
        )
        for key, callback in FORCED_CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments(
            ("model.init_args.tokenizer", "model.init_args.model_name_or_path"),
            "data.init_args.tokenizer",
            compute_fn=lambda tokenizer, model: tokenizer or model,
        )
        parser.link_arguments("model.init_args.revision", "data.init_args.tokenizer_revision")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check every setting with its place first, then let LightningCLI parse."""
        verb, *rest = self.args_given = list(args)
        if not asks_for_help(rest):
            classes = {"trainer": Trainer, **FORCED_CALLBACKS}
            check_settings(rest, self._parser(verb), classes)
        rest, templates = take_templates(rest)
        self.config = parser.parse_args([verb, *rest])
        for key, value in templates.items():
            self.config[verb].data.init_args[key] = value

    def _parse_ckpt_path(self) -> None:
        """Keep the user's settings: a checkpoint never brings hyperparameters of its own."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    @property
    def settings(self) -> Namespace:
        """The parsed settings of the chosen verb."""
        return self.config[str(self.subcommand)]

    @property
    def root(self) -> Path:
        return Path(self.settings.trainer.default_root_dir or ".")

    @property
    def run_folder(self) -> runs.RunFolder:
        """Where the run writes, once it is claimed."""
        assert self._run is not None, "the run folder is claimed in instantiate_trainer()"
        return self._run

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        problems = trainer_problems(trainer)
        for key in ("early_stopping", "checkpoint"):
            if self.settings[key].monitor not in MONITORED:
                problems.append(
                    f"{key}.monitor: '{self.settings[key].monitor}' is not measured"
                    f"{nearest(self.settings[key].monitor, list(MONITORED)) or '; known: ' + ', '.join(MONITORED)}"
                )
        if trainer.plugins:
            self.why_precision = "the plugins decide"
        elif trainer.precision is None:
            trainer.precision, self.why_precision = choose_precision(str(trainer.accelerator))
        else:
            self.why_precision = "as asked"
        try:
            runs.check_name(self.settings.name)
        except UserError as error:
            problems += error.problems
        self._problems = problems
        if self.settings.data.init_args.get("cache_dir") is None:
            self.settings.data.init_args.cache_dir = str(self.root / runs.LOGS / ".cache")

    def instantiate_classes(self) -> None:
        problems = self._problems
        for key in (
            "data",
            "model",
            *FORCED_CALLBACKS,
        ):  # alone first, so that all mistakes are shown
            alone = Namespace({key: self.settings[key]})
            try:
                self._parser(self.subcommand).instantiate_classes(alone)
            except Exception as error:
                behind = _user_error_behind(error)
                if behind is None:
                    raise
                problems += behind.problems
        if problems:
            raise UserError(*problems)
        try:
            super().instantiate_classes()
        except (
            ValueError
        ) as error:  # a class of the user's (callback, logger, plugin) refuses its arguments
            if "Does not validate" not in str(error):
                raise
            raise UserError(f"trainer: {innermost(str(error))}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        check_trainer(self.settings.trainer)
        if is_first_process():
            check_writable(self.root)
        self._check_before_weights()
        self.place = find_place(
            str(self.subcommand),
            self.settings.get("ckpt_path") or self._before_requeue(),
            name=self.settings.name,
            root=self.root,
            configs=[str(config) for config in self.settings.config or []],
        )
        self._check_same_run()
        run = claim(self.place, self.settings.name, self.root)
        self._run = run
        if is_first_process():
            if self._lock is None:  # a run that goes back to a checkpoint comes here again
                self._lock = RunLock(run.path, str(self.subcommand))
                tee_to(run.path / "train.log")
            self._record_origin()
        for note in self.place.notes:
            log.info("WARNING: %s", note)
        given = self._get(self.config_init, "trainer")
        own_loggers: list[Logger] = [MetricsCSV(run.path)]
        if self.subcommand == "fit":
            own_loggers = default_loggers(run.path, keep_until=self.place.step)
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
                FolderCheckpointIO(with_identity(self.model.export, self.identity)),
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
        if self.subcommand != "fit":
            return
        config = self.run_folder.path / "config.yaml"
        if self.changes and config.is_file():  # the run's own config goes on with the run
            earlier = config.with_name(f"config_until_step_{self.place.step}.yaml")
            earlier.write_bytes(config.read_bytes())
            save_config(self._parser("fit"), self.settings, config, ckpt_path=None)
        record_origin(
            self.run_folder,
            self.place,
            self.identity,
            self.changes,
            model=self.model.model_name_or_path,
            command=self.args_given,
        )

    def _write_data_facts(self) -> None:
        file = self.run_folder.path / "data.json"
        if not file.exists():
            audit = self.datamodule.prepared.facts["audit"]
            file.write_text(json.dumps(audit, indent=1, ensure_ascii=False), "utf-8")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        progress = TrainingProgress(bar=self.settings.trainer.enable_progress_bar is not False)
        signals = StopSignals(self.stop)
        return super()._instantiate_trainer(
            config, [*callbacks, progress, StepRows(), TestOpenings(), RunRecord(signals), signals]
        )

    def _check_before_weights(self) -> None:
        """Prepare the data and hold everything against everything that needs no weights."""
        model, data = self.model, self.datamodule
        data.cap_length(model.max_positions(data.tokenizer if model.from_config else None))
        data.prepare_data()
        plan = self.plan = data.make_plan(self.settings.trainer.max_steps)
        model.check(plan, data.tokenizer)
        asked = self.settings.trainer.val_check_interval
        self.val_check_interval = validation_steps(asked, plan.steps_per_epoch)
        self.chosen = self._take_choices(plan)
        problems = []
        if "validation" not in plan.num_rows and self.settings.early_stopping.patience is not None:
            problems.append(
                "early_stopping.patience: set, but data.split leaves no validation rows to watch; give a validation "
                "split, or early_stopping.patience: null"
            )
        needed = {"validate": "validation", "test": "test"}.get(str(self.subcommand))
        if self.settings.test_at_end and self.subcommand == "fit":
            needed = "test"
        if needed and needed not in plan.num_rows:
            verb = self.subcommand if self.subcommand != "fit" else "test"
            problems.append(
                f"data.split: there is nothing to {verb}: the data has {', '.join(plan.num_rows)} but no {needed} rows"
            )
        if problems:
            raise UserError(*problems)

    def _take_choices(self, plan: DataPlan) -> dict[str, Choice]:
        """Write what rules chose for settings left open into the settings, so that the saved config shows them."""
        chosen = {}
        for key, choice in plan.choices.items():
            section, name = key.split(".")
            settings = self.settings[section].init_args
            if name in settings and settings[name] is None:
                settings[name] = choice.value
                chosen[key] = choice
        return chosen

    # ---- verbs

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Train, validate the best weights, and test them if asked to."""
        start = time.monotonic()
        record = self.place.run.read() if self.place.run is not None else {}
        if record.get("status") == "finished" and record.get("num_steps", 0) >= self.plan.num_steps:
            log.info("this run is finished; extend it with --data.epochs or --trainer.max_steps")
            tested = any(result["split"] == "test" for result in record.get("results", []))
            if self.settings.test_at_end and not tested:
                self.test(model, datamodule)
            return
        self._fit(model, datamodule)
        if self.stop.agreed(self.trainer):
            raise Stopped(self.stop.signum)
        model, datamodule = self.model, self.datamodule
        seconds = time.monotonic() - start
        best = self.trainer.strategy.broadcast(self.run_folder.checkpoint("best"))
        if best is not None and "validation" in self.plan.num_rows:
            self.trainer.validate(
                model, datamodule=datamodule, ckpt_path=_text(best.resolve()), verbose=False
            )
        done = self.trainer.strategy.broadcast(self.run_folder.read().get("status") == "finished")
        if self.settings.test_at_end and not done:
            log.info("the test split stays sealed: the run stopped before its last step")
        elif best is not None and self.settings.test_at_end:
            self.trainer.test(
                model, datamodule=datamodule, ckpt_path=_text(best.resolve()), verbose=False
            )
        if self.trainer.is_global_zero:
            targets = dict(self.settings.targets)
            for line in summary.end_of_fit(self.run_folder, seconds, targets):
                log.info(line)

    def _fit(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Train; where a guard asks for it, go on from the newest checkpoint, perhaps in another precision."""
        for _ in range(MAX_GOING_BACK):
            try:
                checkpoint = _text(self.place.checkpoint)
                self.trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
                return
            except GoBack as back:
                reason = back.reason
                newest = self.run_folder.checkpoint("last")
                if newest is None:
                    raise UserError(f"{reason}; there is no checkpoint to go back to") from back
                redone = self.trainer.global_step - global_step(newest)
                log.info(
                    "WARNING: %s; going back to %s: %d steps are redone",
                    reason,
                    newest.name,
                    redone,
                )
                self.settings.ckpt_path = str(newest)
                self.settings.trainer.precision = back.precision or self.settings.trainer.precision
            self.instantiate_classes()
            model, datamodule = self.model, self.datamodule
        raise UserError(f"{reason}; the run went back {MAX_GOING_BACK} times, and it happens again")

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Measure the checkpoint on the validation split."""
        self.trainer.validate(
            model, datamodule=datamodule, ckpt_path=_text(self.place.checkpoint), verbose=False
        )
        self._show_result()

    def test(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Measure the checkpoint on the test split."""
        self.trainer.test(
            model, datamodule=datamodule, ckpt_path=_text(self.place.checkpoint), verbose=False
        )
        self._show_result()

    def _show_result(self) -> None:
        if self.trainer.is_global_zero:
            for line in summary.evaluation(self.run_folder):
                log.info(line)

    # ---- the end, if it is not the planned one

    def _before_requeue(self) -> str | None:
        """Find the last checkpoint of the same SLURM job's earlier start: the command line is the same."""
        run = runs.version_of_job(self.root, self.settings.name, str(slurm.job_id()))
        if self.subcommand != "fit" or not slurm.was_requeued() or run is None:
            return None
        log.info("SLURM started job %s again: going on in %s", slurm.job_id(), run.path)
        return _text(run.checkpoint("last"))

    def _say_stopped(self, stopped: Stopped) -> None:
        if self._run is None or not is_first_process():
            return
        for line in summary.stopped(self.run_folder, str(self.subcommand), str(stopped)):
            log.info(line)
        ended = self.run_folder.read().get("status") == "finished"
        if stopped.asks_for_requeue and self.subcommand == "fit" and not ended:
            slurm.requeue(self.trainer)

    def _note_how_to_go_on(self, error: Exception) -> None:
        """Add the resume command below the traceback, if this process had begun to train."""
        trainer = getattr(self, "trainer", None)
        if self._run is None or trainer is None or self.subcommand != "fit":
            return
        if _user_error_behind(error) is None or trainer.global_step > self.place.step:
            only_file = {"only_file": True}
            log.info("%s", "".join(traceback.format_exception(error)), extra=only_file)
            error.add_note(summary.resume(self.run_folder))


class PreparedCLI(FineTuneCLI):
    """Parse, check and prepare the data as ``fit`` does, and stop before anything is claimed or loaded."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        check_trainer(self.settings.trainer)
        self._check_before_weights()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: the caller looks at ``plan``, ``datamodule``, ``model`` and ``chosen``."""


def main(args: list[str] | None = None) -> int:
    """Run fit, validate or test; return the exit code: 2 for what the user can fix."""
    if not is_first_process() and RUN_VARIABLE in os.environ:
        end_with_parent()
    stop = StopRequest()
    return exit_code(lambda: _run(FineTuneCLI, sys.argv[1:] if args is None else args, stop), stop)


def prepare_as_fit(args: list[str]) -> PreparedCLI:
    """Take fit's flags as far as its data and its settings, without weights and without a run folder.

    Raises:
        UserError: What ``fit`` would refuse.
    """
    return _run(PreparedCLI, ["fit", *args], StopRequest())


def exit_code(run: Callable[[], Any], stop: StopRequest | None = None) -> int:
    """Run something for the user: 0, or 2 and one line per mistake of theirs; a defect of ours keeps its traceback.

    Args:
        run: What to run.
        stop: Listens for signals meanwhile; 143 or 130 if one ended it.
    """
    start_console()
    try:
        with stop or StopRequest():
            run()
    except Stopped as stopped:
        if is_first_process():
            print(f"stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        behind = _user_error_behind(error)
        if behind is None:
            raise
        for problem in behind.problems:
            print(f"error: {problem}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        return 2
    finally:
        stop_tee()
    return 0


def _run(cli: type[CLI], args: list[str], stop: StopRequest) -> CLI:
    return cli(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        seed_everything_default=42,
        save_config_callback=RunConfig,
        trainer_defaults={
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
        },
        parser_class=Parser,
        parser_kwargs={
            "prog": "python -m fine_tune",
            **{verb: {"epilog": HELP_HINT} for verb in FineTuneCLI.subcommands()},
        },
        args=args,
        stop=stop,
    )


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """Find the user's mistake that jsonargparse wrapped into an error of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def save_config(
    parser: LightningArgumentParser, settings: Namespace, file: Path, **replaced: Any
) -> None:
    """Write settings so that they can be run again; what was allowed once is not allowed for ever."""
    settings = _without_enums(settings)
    for key, value in {"allow_changes": False, **replaced}.items():
        settings[key] = value
    unfinished = file.with_name(f".{file.name}.unfinished")
    parser.save(settings, str(unfinished), skip_none=False, multifile=False, overwrite=True)
    unfinished.replace(file)


def _without_enums(value: Any) -> Any:
    """Replace enum members by their values: jsonargparse cannot write the string enums of Lightning's defaults."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _without_enums(item) for key, item in vars(value).items()})
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _listed(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None
