"""``config.yaml`` in the run folder: every setting as resolved, so that the run can be started again."""

import enum
import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from fine_tune.runs.run_folder import run_of


class RunConfig(SaveConfigCallback):
    """Write the resolved settings to ``config.yaml`` in the run folder, once."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = run_of(trainer).path / "config.yaml"
        if trainer.is_global_zero and not file.exists():
            save_config(self.parser, self.config, file)


def save_config(
    parser: LightningArgumentParser, settings: Namespace, file: Path, **replaced: Any
) -> None:
    """Write settings so that they can be run again; what was allowed once is not allowed for ever."""
    settings = _without_enums(settings)
    for key, value in {"allow_changes": False, **replaced}.items():
        settings[key] = value
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    parser.save(settings, str(unfinished), skip_none=False, multifile=False, overwrite=True)
    unfinished.replace(file)


def _without_enums(value: Any) -> Any:
    """Replace enum members by their values: jsonargparse cannot write the string enums of Lightning's defaults."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _without_enums(item) for key, item in vars(value).items()})
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value
