"""The command line of predict: a run's config, or a model alone; its own rows; nothing written but the output."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins import Precision

from fine_tune.callbacks.precision_fallback import safer
from fine_tune.callbacks.prediction_writer import PredictionWriter
from fine_tune.callbacks.stop_signals import Stopped, StopRequest
from fine_tune.errors import UserError
from fine_tune.exits import exit_code, user_error_behind
from fine_tune.model_cli import ModelCLI
from fine_tune.modules.prediction import Predicting
from fine_tune.output_file import OutputFile, output_problems
from fine_tune.runs.checkpoint_io import FolderCheckpointIO
from fine_tune.runs.places import Place
from fine_tune.runs.run_folder import lowered_precision
from fine_tune.sampling import Sampling
from fine_tune.settings_cli import run_cli
from fine_tune.trainer_settings import check_trainer

log = logging.getLogger("fine_tune")


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
        precision, plugins = self._precision(
            _listed(self._get(self.config_init, "trainer").plugins)
        )
        kwargs["precision"] = self.settings.trainer.precision = precision
        self.model.predicting = Predicting(sampling, max_new_tokens or 0)
        self.model.starts_from_checkpoint = self.place.checkpoint is not None
        rows = self.datamodule.predict_rows
        self.output = OutputFile(
            Path(self.settings.output),
            self._identity(sampling, max_new_tokens),
            overwrite=self.settings.overwrite,
        )
        self.datamodule.rows_done = set(self.output.results)
        self.writer = PredictionWriter(self.output, self.stop)
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
                *plugins,
                FolderCheckpointIO(self.model.export, self.place.check),
            ],
            **kwargs,
        )

    def _precision(self, plugins: list[Any]) -> tuple[str | None, list[Any]]:
        """Return the trainer's precision, or the safer one that the run's steps fell back to, and the plugins left."""
        given, run = self.settings.trainer.precision, self.place.run
        others = [plugin for plugin in plugins if not isinstance(plugin, Precision)]
        by_plugin = next((str(p.precision) for p in plugins if isinstance(p, Precision)), None)
        lowered = lowered_precision(run.read()) if run is not None else None
        now = by_plugin or given or "32-true"
        if lowered is None or safer(now, lowered) == now:
            return given, plugins
        log.info("precision: %s, lowered while the run was trained", lowered)
        return lowered, others

    def _checked(self, sampling: Sampling) -> tuple[Place, int | None]:
        """Find everything that is wrong before weights load."""
        problems = output_problems(self.settings.output, self.datamodule.predict_path)
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
        model = self.model.model_settings
        form: dict[str, Any] = {"quantization": model.quantization, "config": model.config or None}
        form["dtype"] = model.dtype if model.dtype != "auto" else None
        prompts = hashlib.sha256(json.dumps([i.input_ids for i in rows.items]).encode())
        return {
            "rows": rows.content,
            **{f"data.{name}": value for name, value in templates.items() if value is not None},
            "prompts": prompts.hexdigest(),
            **self.weights_identity(self.place),
            **{f"model.{name}": value for name, value in form.items() if value is not None},
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


def _listed(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]
