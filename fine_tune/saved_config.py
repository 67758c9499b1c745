"""``config.yaml`` in the run folder: every setting as resolved, so that the run can be started again."""

import enum
import logging
import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from fine_tune.redaction import redacted
from fine_tune.runs.disk import told_by_path
from fine_tune.runs.run_folder import run_of

CONFIG_BYTES = 10_000
log = logging.getLogger("fine_tune")


class RunConfig(SaveConfigCallback):
    """Write the resolved settings to ``config.yaml`` in the run folder, once."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = run_of(trainer).path / "config.yaml"
        if trainer.is_global_zero and not file.exists():
            save_config(self.parser, self.config, file)


def save_config(
    parser: LightningArgumentParser, settings: Namespace, file: Path, **replaced: Any
) -> None:
    """Write settings so that they can be run again; what was allowed once is not allowed for ever, no secret is kept.

    A value that holds the value of a secret environment variable is written with ``***`` in its place, and told.
    """
    settings = _plain(settings)
    hidden = [
        key for key, value in vars(settings.as_flat()).items() if _without_secrets(value) != value
    ]
    if hidden:
        log.info(
            "WARNING: %s: holds the value of a secret environment variable; %s has *** there: give it again to go on",
            ", ".join(hidden),
            file.name,
        )
    for key in hidden:
        settings[key] = _without_secrets(settings[key])
    for key, value in {"allow_changes": False, **replaced}.items():
        settings[key] = value
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        with told_by_path(file, CONFIG_BYTES, "trainer.default_root_dir"):
            parser.save(
                settings,
                str(unfinished),
                skip_none=False,
                skip_validation=True,  # they were parsed; *** is no setting
                multifile=False,
                overwrite=True,
            )
            unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Copy settings, enum members as values: jsonargparse cannot write the string enums of Lightning's defaults."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(item) for key, item in vars(value).items()})
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**{key: _without_secrets(item) for key, item in vars(value).items()})
    if isinstance(value, dict):
        return {_without_secrets(key): _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
