"""The settings of fit, validate, test and predict: parsed, and held against all that needs no weights."""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fine_tune.adapters import changed_fields
from fine_tune.batches import Choice, DataPlan
from fine_tune.callbacks.checkpoints import Checkpoints
from fine_tune.callbacks.early_stopping import EarlyStopping
from fine_tune.callbacks.generations import Generations
from fine_tune.callbacks.precision_fallback import PrecisionFallback
from fine_tune.callbacks.stop_signals import StopRequest
from fine_tune.callbacks.vram_guard import VRAMGuard
from fine_tune.config_check import asks_for_help, check_settings, know_short_names
from fine_tune.errors import UserError
from fine_tune.exits import user_error_behind
from fine_tune.memory_choices import choose_by_memory
from fine_tune.parser_reports import innermost, with_key
from fine_tune.plan_checks import plan_problems
from fine_tune.report.cost import grid_problems
from fine_tune.runs.run_folder import LOGS, check_name
from fine_tune.saved_config import RunConfig
from fine_tune.settings import take_templates
from fine_tune.trainer_settings import (
    choose_precision,
    trainer_problems,
    validation_steps,
)

FORCED_CALLBACKS = {
    "precision_fallback": PrecisionFallback,
    "vram_guard": VRAMGuard,
    "checkpoint": Checkpoints,
    "early_stopping": EarlyStopping,
    "generations": Generations,
}
HELP_HINT = "Options of the model and the data: --model.help SFT, --data.help SFTData"

CLI = TypeVar("CLI", bound="SettingsCLI")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors reach the user as one clean line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        raise UserError(with_key(message)) from ex


class SettingsCLI(LightningCLI):
    """Parse the settings, build the classes, prepare the data, and say all mistakes at once.

    Args:
        stop: Where this process listens for signals.
    """

    groups: ClassVar[dict[str, type]] = {}  # a verb's own settings, by section

    def __init__(self, *args: Any, stop: StopRequest, **kwargs: Any) -> None:
        self.stop, self.verb = stop, str(kwargs["args"][0])
        super().__init__(*args, **kwargs)  # runs the verb

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Name the verb that was typed, with what its method gets from us; parsers of the others only cost time."""
        loaders = (
            ("train_dataloaders", "val_dataloaders") if self.verb == "fit" else ("dataloaders",)
        )
        ours = {"model", *loaders, "datamodule", "weights_only"}
        return {self.verb: ours if self.verb == "fit" else ours | {"verbose"}}

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
            "--report",
            type=Literal["en", "id"] | None,
            default="en",
            help="Language of the report written at the end: en or id (Indonesian); null: no report.",
        )
        parser.add_argument(
            "--purpose", type=str, default="", help="What the run is for, in words, for the report."
        )
        parser.add_argument(
            "--licences",
            type=dict[str, str],
            default={},
            help="Licence of each source by its path or hub name, or of 'all', for the report.",
        )
        parser.add_argument(
            "--grid_gco2e_per_kwh",
            type=float | None,
            default=None,
            help="Grams of CO2e per kWh of your grid, for the report, where a GPU's energy is measured.",
        )
        parser.add_argument(
            "--allow_changes",
            type=bool,
            default=False,
            help="Resume although settings or data differ from the checkpoint's; every difference is recorded.",
        )
        for key, callback in FORCED_CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        for key, group in self.groups.items():
            parser.add_class_arguments(group, key)
        parser.link_arguments(
            ("model.init_args.tokenizer", "model.init_args.model_name_or_path"),
            "data.init_args.tokenizer",
            compute_fn=lambda tokenizer, model: tokenizer or model,
        )
        parser.link_arguments("model.init_args.revision", "data.init_args.tokenizer_revision")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check every setting with its place first, then let LightningCLI parse."""
        verb, *rest = self.args_given = list(args)
        if asks_for_help(rest):
            know_short_names()
        else:
            classes = {"trainer": Trainer, **FORCED_CALLBACKS, **self.groups}
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

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        if trainer.default_root_dir:  # in a YAML, no shell has taken ~ for the home
            trainer.default_root_dir = os.path.expanduser(trainer.default_root_dir)
        problems = trainer_problems(trainer)
        problems += grid_problems(self.settings.get("grid_gco2e_per_kwh"))
        if trainer.plugins:
            self.why_precision = "the plugins decide"
        else:
            asked, accelerator = trainer.precision, str(trainer.accelerator)
            trainer.precision, self.why_precision = choose_precision(accelerator, asked)
        try:
            check_name(self.settings.name)
        except UserError as error:
            problems += error.problems
        self._problems = problems
        cache_dir = self.settings.data.init_args.get("cache_dir")
        self.settings.data.init_args.cache_dir = (
            str(self.root / LOGS / ".cache") if cache_dir is None else os.path.expanduser(cache_dir)
        )

    def instantiate_classes(self) -> None:
        problems = self._problems
        for key in (
            "data",
            "model",
            *FORCED_CALLBACKS,
            *self.groups,
        ):  # alone first, so that all mistakes are shown
            alone = Namespace({key: self.settings[key]})
            try:
                self._parser(self.subcommand).instantiate_classes(alone)
            except Exception as error:
                behind = user_error_behind(error)
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

    def check_before_weights(self) -> None:
        """Prepare the data and hold everything against everything that needs no weights."""
        model, data = self.model, self.datamodule
        settings = model.model_settings
        tokenizer = data.tokenizer if settings.from_config is not None else None
        data.meet_model(settings.max_positions(tokenizer), settings.vocabulary_size(tokenizer))
        data.prepare_data()
        plan = self.plan = data.make_plan(self.settings.trainer.max_steps)
        model.check(plan, data.tokenizer)
        asked = self.settings.trainer.val_check_interval
        self.val_check_interval = validation_steps(asked, plan.steps_per_epoch)
        self.chosen = {**self._take_choices(plan), **self._take_what_fits()}
        problems = plan_problems(self.settings, str(self.subcommand), model, plan)
        if problems:
            raise UserError(*problems)

    def _take_what_fits(self) -> dict[str, Choice]:
        """Find out what was left to memory (``auto``), and write it into the settings."""
        if self.subcommand != "fit":
            return {}
        chosen = choose_by_memory(self.model, self.datamodule, str(self.settings.trainer.precision))
        for key, choice in chosen.items():
            section, name = key.split(".")
            self.settings[section].init_args[name] = choice.value
        self.plan = self.datamodule.make_plan(self.settings.trainer.max_steps)
        return chosen

    def _take_choices(self, plan: DataPlan) -> dict[str, Choice]:
        """Write what rules chose for settings left open into the settings, so that the saved config shows them."""
        chosen = {}
        for key, choice in plan.choices.items():
            section, name = key.split(".")
            settings = self.settings[section].init_args
            if name in settings and settings[name] is None:
                settings[name] = choice.value
                chosen[key] = choice
        if self.settings.model.init_args.get("lora") == "auto":
            self.settings.model.init_args.lora = Namespace(
                class_path="peft.LoraConfig",
                init_args=Namespace(**changed_fields(self.model.model_settings.lora)),
            )
        return chosen


def run_cli(cli: type[CLI], args: list[str], stop: StopRequest) -> CLI:
    """Make a CLI of the project, which runs what ``args`` say."""
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
            args[0]: {"epilog": HELP_HINT},
        },
        args=args,
        stop=stop,
    )
