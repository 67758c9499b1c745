"""The model a run trained, from its ``config.yaml`` and a checkpoint: for verbs that need no data."""

import logging
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fine_tune import adapters, models, modules
from fine_tune.errors import UserError
from fine_tune.model_config import first_line
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.weights import load_weights, restore_weights
from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.stored_checkpoints import newest_whole

log = logging.getLogger("fine_tune")
HEADS: dict[str, models.Head] = {name: getattr(modules, name).head for name in modules.__all__}
MODEL_FIELDS = (
    *("model_name_or_path", "revision", "from_config", "tokenizer"),
    *("attn_implementation", "quantization"),
)


@dataclass(frozen=True)
class TrainedModel:
    """What a run trained, and where it lies.

    Args:
        run: The run folder.
        config: Its ``config.yaml``.
        checkpoint: One of its checkpoints, whole.
        settings: How its model is made.
        directory: Where its command was typed; the config's relative paths start there.
    """

    run: RunFolder
    config: dict[str, Any]
    checkpoint: Path
    settings: ModelSettings
    directory: Path

    @property
    def trains_adapter(self) -> bool:
        """Whether the checkpoint holds an adapter, not full weights."""
        return (self.checkpoint / "adapter_config.json").is_file()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own."""
        return models.load_tokenizer("tokenizer", str(self.checkpoint), None)

    def load(self) -> Any:
        """Load it as it was for training: an adapter on its base, frozen and quantized as then.

        Raises:
            UserError: The base is gone, or another one than the adapter was trained on.
        """
        settings, tokenizer = self.settings, self.tokenizer
        settings.take_stored(self.model_config())
        with chdir(self.directory):
            model = load_weights(settings, tokenizer, str(self.config["trainer"]["precision"]))
            restore_weights(model, settings, self.checkpoint)
        if settings.head == "score":  # where transformers reads a score
            tokenizer.pad_token = models.scoring_pad(tokenizer)
            model.config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    def model_config(self) -> PreTrainedConfig:
        """Return the model's config, as the run resolved it.

        Raises:
            UserError: The base is gone.
        """
        try:
            with chdir(self.directory):
                return self.settings.resolved_config(self.tokenizer)
        except UserError as error:
            moved = "base_model: if the base was moved, give its place now: --base_model FOLDER"
            missing = f"'{self.settings.model_name_or_path}' does not exist" in error.problems[0]
            raise UserError(*error.problems, *([moved] if missing else [])) from error


def trained_model(run: RunFolder, which: str = "best", base: str | None = None) -> TrainedModel:
    """Find what a run trained; nothing is loaded yet.

    Args:
        run: The run folder.
        which: ``best`` or ``last``.
        base: Where the weights that it started from lie now; None: where they were.

    Raises:
        UserError: The run has no config, no whole checkpoint, or its config is not readable.
    """
    file = run.path / "config.yaml"
    if not file.is_file():
        raise UserError(f"run: {run.path} has no config.yaml, so nobody knows what its model was")
    if which not in ("best", "last"):
        raise UserError(f"checkpoint: '{which}' is neither best nor last")
    config = _read_config(file)
    checkpoint, notes, _ = newest_whole(run, which)
    for note in notes:
        log.info("WARNING: %s", note)
    section = config["model"]
    settings = _model_settings(section, file)
    if base is not None:
        settings.model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    return TrainedModel(run, config, checkpoint.resolve(), settings, run.directory)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
        if isinstance(config["model"], dict) and isinstance(config["trainer"], dict):
            return dict(config)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as a run's config: {first_line(error)}") from error
    raise UserError(f"{file}: is not a run's config; it has no model or no trainer section")


def _model_settings(section: Any, file: Path) -> ModelSettings:
    """Read how a run's model is made. Nothing that the config names is imported, built or called.

    Raises:
        UserError: It is not the model section of a run.
    """
    try:
        head = HEADS[str(section["class_path"]).rpartition(".")[2]]
        given = dict(section["init_args"])
        lora = given.get("lora")
        fields: dict[str, Any] = {name: given.get(name) for name in MODEL_FIELDS}
        fields["config"] = dict(given.get("config") or {})
        if isinstance(lora, dict):
            of_lora = dict(lora.get("init_args", lora))
            arguments = {k: v for k, v in of_lora.items() if k not in adapters.PEFTS_OWN}
            if arguments.get("init_lora_weights") == "loftq":
                arguments["init_lora_weights"] = (
                    True  # what it made of the adapter is in the adapter
                )
            lora = LoraConfig(**arguments)
        return ModelSettings(
            **fields,
            dtype=str(given.get("dtype", "auto")),
            lora=lora,
            gradient_checkpointing=False,
            head=head,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: its model section is not one of this project's runs ({type(error).__name__}: {error})"
        ) from error
