"""A run's config, or a model alone, taken as far as its checkpoint: what predict and chat begin with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from fine_tune.config_check import asks_for_help
from fine_tune.data.predict_rows import NO_ROWS
from fine_tune.errors import UserError
from fine_tune.modules.run_identity import weights_content
from fine_tune.runs.places import Place, find_place
from fine_tune.settings import Setting, read_yaml, split_flags
from fine_tune.settings_cli import SettingsCLI

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
        raise UserError(NO_ROWS)
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
