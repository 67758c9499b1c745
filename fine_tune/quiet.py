"""The one quiet place: what libraries say that no user can act on. Imported before them."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from fine_tune.redaction import redacted

NOT_ACTIONABLE = (
    r".*when logging on epoch level in distributed setting.*",  # torchmetrics has reduced them
    r".*LightningCLI's args parameter is intended.*",
    r".*does not have many workers.*",
    r".*callbacks used to create the checkpoint need to be provided.*",  # to go on training
    r".*predict returned None.*",  # results are written as they come
    r".*Total length of `list` across ranks is zero.*",  # no validation rows, as asked
    r".*smaller than the logging interval.*",
    r".*exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Found .* module\(s\) in eval mode.*",
    r".*Found keys that are not in the model state dict.*",
    r".*lr_scheduler.step\(\)` before `optimizer.step\(\).*",
    r".*Missing logger folder.*",
    r".*tensorboardX.*",
    r".*`loftq_config` specified but will be ignored.*",  # jsonargparse gives every field its default
)

LOGGERS_TO_QUIET = (  # by their own names: Lightning sets its root logger's level when it is imported
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "bitsandbytes",
    "torch",
    "datasets.packaged_modules.json.json",
    "datasets.packaged_modules.parquet.parquet",
)


def quiet_libraries() -> None:
    """Set environment and filters; a user's own settings of the same variables win."""
    for key, value in {
        "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(key, value)
    for message in NOT_ACTIONABLE:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in LOGGERS_TO_QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def start_console() -> None:
    """Send the project's messages to the terminal, plain, one line each."""
    log = logging.getLogger("fine_tune")
    if not log.handlers:
        handler = _Console()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(
            lambda record: not getattr(record, "only_file", False)
        )  # the progress bar shows it
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    log.disabled = rank != "0"


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to whatever ``sys.stdout`` is at the time."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, _: Any) -> None:
        pass

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(
            sys.exc_info()[1], BrokenPipeError
        ):  # nobody reads any more, as behind ``| head``
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            super().handleError(record)


class _File(logging.FileHandler):
    """A log file that cannot be written is one line on the terminal, not a traceback for each message."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"WARNING: {self.baseFilename} cannot be written ({error.strerror})")

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.stream = None  # told already


def tee_to(file: Path) -> None:
    """Copy the project's messages to a file, after what it already holds, until ``stop_tee``."""
    handler = _File(file, mode="a", encoding="utf-8")
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.getLogger("fine_tune").addHandler(handler)


class _WithoutSecrets(logging.Formatter):
    """Blot out the values of environment variables that hold secrets: tracebacks and server answers quote them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def stop_tee() -> None:
    """Close the files that ``tee_to`` opened."""
    log = logging.getLogger("fine_tune")
    for handler in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(handler)
        handler.close()
