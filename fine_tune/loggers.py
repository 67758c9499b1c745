"""Loggers that go on where a killed run stopped, and that never stop a run."""

import csv
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("fine_tune")
METRICS_FILE = "metrics.csv"
START_SECONDS = 4  # how long W&B's server is waited for
FINISH_SECONDS = 30  # how long its last uploads are
LEADING_COLUMNS = (
    "step",
    "epoch",
    "train/loss",
    "lr",
    "grad_norm",
    "perf/tokens_per_second",
    "val/loss",
)


class MetricsCSV(Logger):
    """Write one row per logged optimizer step to ``metrics.csv``; row ``step=N`` is the N-th step, from 1.

    Values logged for the same step share its row. Reopening keeps the rows up to the step that training goes on from.
    On a full disk, rows wait in memory until there is room again.

    Args:
        folder: The run folder.
        keep_until: Keep rows up to this step, later ones are redone by the resumed run; None keeps all.
    """

    def __init__(self, folder: Path, keep_until: int | None = None) -> None:
        super().__init__()
        self.folder, self.file = Path(folder), Path(folder) / METRICS_FILE
        self._columns: list[str] = list(LEADING_COLUMNS)
        self._written_until = 0  # bytes of complete rows; what follows them in the file is the tail
        self._tail: list[
            dict[str, str]
        ] = []  # the last row, after those an error kept from the file
        self._failing = False
        if self.file.is_file() and getattr(rank_zero_only, "rank", 0) == 0:
            content = self.file.read_bytes()
            # what a power failure left behind the last whole row is half a row, or bytes of zero
            self._written_until = content.rfind(b"\n") + 1
            rows = self._read()
            header = io.StringIO(content[: self._written_until].decode(), newline="")
            self._columns = next(csv.reader(header), self._columns)
            if keep_until is not None:
                if self._written_until < len(content):
                    log.info("WARNING: %s ends in half a row, which is left out", self.file)
                rows = [row for row in rows if int(row["step"]) <= keep_until]
                self._rewrite(rows[:-1], self._columns)
                self._tail = rows[-1:]
                self._write_tail()

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def save_dir(self) -> str:
        """The run folder itself: Lightning takes ``trainer.log_dir`` from it."""
        return str(self.folder)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the row of a step, or add to it when it is the last one written."""
        row = {
            "step": str(int(step or 0)),
            **{key: f"{float(value):.8g}" for key, value in metrics.items()},
        }
        try:
            if self._tail and self._tail[-1]["step"] == row["step"]:
                self._tail[-1] |= row
            else:
                if not self._failing and self.file.is_file():
                    self._tail, self._written_until = [], self.file.stat().st_size
                self._tail.append(row)
            self._write_tail()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning(
                    "WARNING: %s cannot be written (%s); training goes on, rows wait in memory",
                    self.file,
                    error.strerror,
                )
            self._failing = True

    def _write_tail(self) -> None:
        new = [key for row in self._tail for key in row if key not in self._columns]
        if new or not self.file.is_file():
            rows = self._read() if self.file.is_file() else []
            self._rewrite(rows, [*self._columns, *dict.fromkeys(new)])
        with open(self.file, "r+", newline="") as handle:
            handle.truncate(self._written_until)
            handle.seek(0, os.SEEK_END)
            csv.DictWriter(handle, self._columns).writerows(self._tail)

    def _read(self) -> list[dict[str, str]]:
        complete = self.file.read_bytes()[: self._written_until].decode()
        return list(csv.DictReader(io.StringIO(complete, newline="")))

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        unfinished = self.file.with_name(f".{METRICS_FILE}.unfinished")
        with open(unfinished, "w", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(self.file)
        self._columns, self._written_until = columns, self.file.stat().st_size


class QuietWandb(Logger):
    """Weights & Biases where it is installed and logged in; any failure is one line, and local records go on.

    Args:
        folder: The run folder.
        project: Project on the server.
    """

    def __init__(self, folder: Path, project: str = "fine_tune") -> None:
        super().__init__()
        self.folder, self.project = Path(folder), project
        self._run: Any = None
        self._off = False

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return self.folder.name

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: ``config.yaml`` holds them, and may hold what should stay here."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics; the first failure switches this logger off."""
        if self._off:
            return
        try:
            if self._run is None:
                self._run = self._start()
            self._run.log({**metrics, "trainer/global_step": step})
        except Exception as error:
            self._give_up(error)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait for the last uploads once, and not for ever: the process of a run that has ended holds a machine."""
        run, self._run = self._run, None
        if run is None or self._off:
            return
        exit_code = 0 if status == "success" else 1
        error = _error_within(FINISH_SECONDS, lambda: run.finish(exit_code=exit_code))
        if error is not None:
            self._off = True
            log.warning(
                "WARNING: W&B did not end well (%s); its records lie in %s, 'wandb sync' sends them",
                _first_line(error),
                self.folder / "wandb",
            )

    def _start(self) -> Any:
        import wandb

        # Its records of the machine quote the command line, which may hold secrets.
        settings: dict[str, Any] = {"x_disable_meta": True, "console": "off", "save_code": False}
        settings |= {"silent": True, "init_timeout": START_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # newer ones: when Python exits, too
            settings["finish_timeout"] = FINISH_SECONDS
        name = f"{self.folder.parent.name}-{self.folder.name}"
        options: dict[str, Any] = {
            "project": self.project,
            "name": name,
            "dir": str(self.folder),
            "settings": wandb.Settings(**settings),
        }
        try:
            return wandb.init(**options, resume="allow", id=name)
        except Exception as error:
            log.info(
                "W&B is not reached (%s); logging it offline in %s",
                _first_line(error),
                self.folder / "wandb",
            )
            # W&B still holds the first name for the attempt that failed.
            return wandb.init(**options, mode="offline", id=f"{name}-offline")

    def _give_up(self, error: Exception) -> None:
        self._off = True
        log.info(
            "W&B is off for this run (%s); metrics.csv and TensorBoard go on", _first_line(error)
        )


class QuietTensorBoard(TensorBoardLogger):
    """TensorBoard's curves; any failure, like a full disk, is one line, and ``metrics.csv`` goes on."""

    _off = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics; the first failure switches this logger off."""
        self._try(super().log_metrics, metrics, step)

    @rank_zero_only
    def save(self) -> None:
        self._try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    def _try(self, act: Callable[..., None], *args: Any) -> None:
        if self._off:
            return
        try:
            act(*args)
        except Exception as error:
            self._off = True
            log.warning("WARNING: TensorBoard is off for this run (%s)", _first_line(error))


def default_loggers(folder: Path, keep_until: int) -> list[Logger]:
    """Return CSV first (it decides where the run lies), TensorBoard, and W&B where there is a login for it."""
    tensorboard = QuietTensorBoard(
        save_dir=str(folder.parent.parent),
        name=folder.parent.name,
        version=folder.name,
        default_hp_metric=False,
        purge_step=keep_until + 1 if keep_until else None,
    )
    loggers: list[Logger] = [MetricsCSV(folder, keep_until), tensorboard]
    if _wandb_login():
        loggers.append(QuietWandb(folder))
    return loggers


def _wandb_login() -> bool:
    if os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _error_within(seconds: float, act: Callable[[], Any]) -> Exception | None:
    """Do something in a thread that is left behind when it takes longer, and return what went wrong."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            act()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"it took more than {seconds:g} s")
    return errors[0] if errors else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
