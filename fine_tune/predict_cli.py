"""The command line of predict: a run's config, or a model alone; its own rows; nothing written but the output."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fine_tune.callbacks.prediction_writer import PredictionWriter
from fine_tune.callbacks.stop_signals import Stopped, StopRequest
from fine_tune.config_check import asks_for_help
from fine_tune.errors import UserError
from fine_tune.exits import exit_code, user_error_behind
from fine_tune.modules.prediction import Predicting
from fine_tune.modules.run_identity import weights_content
from fine_tune.output_file import OutputFile, output_problems
from fine_tune.runs.checkpoint_io import FolderCheckpointIO
from fine_tune.runs.places import Place, find_place
from fine_tune.sampling import Sampling
from fine_tune.settings import Setting, read_yaml, split_flags
from fine_tune.settings_cli import SettingsCLI, run_cli
from fine_tune.trainer_settings import check_trainer

log = logging.getLogger("fine_tune")
MODULES, DATA = "fine_tune.modules", "fine_tune.data"


class ModelCLI(SettingsCLI):
    """Take a run's config, or a model alone, as far as its checkpoint; its training data is not touched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_config_callback": None})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"}
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        verb, *rest = list(args)
        if not asks_for_help(rest):
            rest = [*_defaults(rest), *rest]
        super().parse_arguments(parser, [verb, *rest])

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        self.asked_devices = trainer.devices
        trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"
        trainer.logger = trainer.profiler = None  # nothing is measured
        super().before_instantiate_classes()
        if trainer.limit_predict_batches is not None:
            self._problems.append(
                "trainer.limit_predict_batches: not used here; give a shorter data.predict_path"
            )

    @property
    def positions(self) -> int | None:
        """The longest row the model's positions allow."""
        settings = self.model.model_settings
        new_model = settings.from_config is not None
        positions: int | None = settings.max_positions(
            self.datamodule.tokenizer if new_model else None
        )
        return positions

    def find_checkpoint(self) -> Place:
        """Resolve the checkpoint that was asked for; the config of a run means its best.

        Raises:
            UserError: There is none, it is damaged, or without one there would only be random weights.
        """
        place = find_place(
            "predict",
            self.settings.get("ckpt_path"),
            name=self.settings.name,
            root=self.root,
            configs=[str(config) for config in self.settings.config or []],
        )
        if place.checkpoint is None and self.model.model_settings.from_config is not None:
            raise UserError(
                "ckpt_path: none given, and model.from_config alone is a model of random weights; give best, last or "
                "a checkpoint's folder"
            )
        return place

    def weights_identity(self, place: Place) -> dict[str, Any]:
        """Say by content which weights these are."""
        settings = self.model.model_settings
        weights = {"model": weights_content(settings.model_name_or_path, settings.revision)}
        if place.checkpoint is not None:
            manifest = (place.checkpoint / "manifest.json").read_bytes()
            weights["checkpoint"] = hashlib.sha256(manifest).hexdigest()
        return weights


class PredictCLI(ModelCLI):
    """Answer, or score, every row of a file."""

    groups: ClassVar[dict[str, type]] = {"sampling": Sampling}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="File of the results (.jsonl): every row with its fields and its prediction or reward.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace what lies at the output, finished or not.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        check_trainer(self.settings.trainer)
        settings = self.model.model_settings
        settings.gradient_checkpointing = False
        sampling: Sampling = self._get(self.config_init, "sampling")
        self.place, max_new_tokens = self._checked(sampling)
        self.model.predicting = Predicting(sampling, max_new_tokens or 0)
        rows = self.datamodule.predict_rows
        self.output = OutputFile(
            Path(self.settings.output),
            self._identity(sampling, max_new_tokens),
            overwrite=self.settings.overwrite,
        )
        self.datamodule.rows_done = set(self.output.results)
        self.writer = PredictionWriter(self.output, self.stop)
        self.model.starts_from_checkpoint = self.place.checkpoint is not None
        for note in [*self.place.notes, *rows.notes]:
            log.info("%s", note)
        return super().instantiate_trainer(
            max_epochs=1,
            check_val_every_n_epoch=None,
            val_check_interval=None,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=False,
            plugins=[
                *_listed(self._get(self.config_init, "trainer").plugins),
                FolderCheckpointIO(self.model.export, self.place.check),
            ],
            **kwargs,
        )

    def _checked(self, sampling: Sampling) -> tuple[Place, int | None]:
        """Find everything that is wrong before weights load."""
        problems = output_problems(self.settings.output, [self.datamodule.predict_path])
        place, max_new_tokens, positions = None, None, self.positions
        if self.model.can_generate:
            max_new_tokens = sampling.tokens(positions)
            if positions is not None and max_new_tokens >= positions:
                problems.append(
                    f"sampling.max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's {positions} "
                    "positions"
                )
                max_new_tokens = 1  # so that the rows are looked at
        elif sampling != Sampling():
            log.info(
                "WARNING: sampling has no effect: a reward model scores answers, it writes none"
            )
        for check in (
            lambda: self.find_checkpoint(),
            lambda: self._read_rows(positions, max_new_tokens),
        ):
            try:
                place = check() or place
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        assert place is not None
        return place, max_new_tokens

    def _read_rows(self, positions: int | None, max_new_tokens: int | None) -> None:
        self.datamodule.read_predict_rows(positions, max_new_tokens)
        self.model.check(self.datamodule.plan, self.datamodule.tokenizer)

    def _identity(self, sampling: Sampling, max_new_tokens: int | None) -> dict[str, Any]:
        data, rows = self.settings.data.init_args, self.datamodule.predict_rows
        templates = {name: data.get(name) for name in ("format", "prompt", "chosen", "rejected")}
        prompts = hashlib.sha256(json.dumps([i.input_ids for i in rows.items]).encode())
        return {
            "rows": rows.content,
            **{f"data.{name}": value for name, value in templates.items() if value is not None},
            "prompts": prompts.hexdigest(),
            **self.weights_identity(self.place),
            **{f"sampling.{name}": value for name, value in vars(sampling).items()},
            "sampling.max_new_tokens": max_new_tokens,
            "trainer.precision": str(self.settings.trainer.precision),
        }

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        guards = [callback for callback in callbacks if type(callback).__name__ == "VRAMGuard"]
        return super()._instantiate_trainer(config, [*guards, self.writer])

    def predict(self, model: LightningModule, datamodule: LightningDataModule, **_: Any) -> None:
        """Answer the rows that have no answer yet, and write the output."""
        total = len(datamodule.predict_rows.lines)  # type: ignore[attr-defined]
        if self.output.is_finished:
            log.info("%s is finished: %s rows", self.output.path, f"{total:,}")
            return
        self.output.open()
        done = len(self.output.results)
        log.info("%s", self._what(total))
        if str(self.asked_devices) not in ("auto", "1", "-1"):
            log.info(
                "predict takes one device; trainer.devices %s is training's", self.asked_devices
            )
        if done:
            log.info("%s of %s rows are done already: going on", f"{done:,}", f"{total:,}")
        if done == total:
            self.writer.finish(datamodule.predict_rows)  # type: ignore[attr-defined]
            return
        try:
            self.trainer.predict(
                model,
                datamodule=datamodule,
                return_predictions=False,
                ckpt_path=str(self.place.checkpoint) if self.place.checkpoint else None,
            )
        except BaseException as error:
            kept = len(self.output.results)
            if isinstance(error, Stopped) or user_error_behind(error) is not None:
                log.info(
                    "%s of %s rows are kept; the same command goes on from there",
                    f"{kept:,}",
                    f"{total:,}",
                )
            raise
        finally:
            self.output.close()

    def _what(self, total: int) -> str:
        settings = self.model.model_settings
        weights = self.place.checkpoint or settings.model_name_or_path
        trainer, how = self.trainer, self.model.predicting
        line = f"predict: {total:,} rows with {weights}, {trainer.precision} on {trainer.strategy.root_device.type}"
        if self.model.can_generate:
            drawn = how.sampling.temperature
            way = f"temperature {drawn:g}, seed {how.sampling.seed}" if drawn else "greedy"
            line += f"; {way}, at most {how.max_new_tokens:,} tokens"
        return line


def main(args: list[str] | None = None) -> int:
    """Run predict; return the exit code: 2 for what the user can fix."""
    stop = StopRequest()
    given = sys.argv[1:] if args is None else args
    return exit_code(lambda: run_cli(PredictCLI, given, stop), stop)


def _defaults(args: list[str]) -> list[str]:
    """Return flags for what a model alone does not say: its class, and how rows are read.

    Raises:
        UserError: There are no rows to predict.
    """
    given, files = split_flags(args)
    for file in files:
        given += read_yaml(file)[0]
    keys = {setting.key.removesuffix(".class_path"): setting for setting in given}
    if "data.predict_path" not in keys:
        raise UserError(
            "data.predict_path: none given; name the rows to predict, like --data.predict_path rows.jsonl"
        )
    flags = []
    head = "SFT"
    if "model" not in keys:
        head = _class_of(keys.get("model.model_name_or_path"))
        flags += ["--model", f"{MODULES}.{head}"]
    if "data" not in keys:
        flags += ["--data", f"{DATA}.{'PreferenceData' if head == 'Reward' else 'SFTData'}"]
    if not {"data.path", "data.sources"} & set(keys) and not any(
        key.startswith(("data.path.", "data.sources.")) for key in keys
    ):
        flags += ["--data.path", str(keys["data.predict_path"].value)]
    return flags


def _class_of(model: Setting | None) -> str:
    """Name the module of a model folder: a saved reward model says in its config that it scores."""
    file = Path(str(model.value)) / "config.json" if model is not None else Path()
    if not file.is_file():
        return "SFT"
    try:
        architectures = json.loads(file.read_text("utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return "SFT"
    scores = any(str(name).endswith("ForSequenceClassification") for name in architectures)
    return "Reward" if scores else "SFT"


def _listed(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]
