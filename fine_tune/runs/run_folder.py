"""A run is a folder, ``lightning_logs/<name>/version_N``; its ``run.json`` says what became of it.

``best`` and ``last`` are resolved from that record, never from file names or the memory of a process.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError

log = logging.getLogger("fine_tune")
LOGS = "lightning_logs"
RECORD = "run.json"
# lists of mappings in the record, with what those of all versions have
LISTS: dict[str, tuple[str, ...]] = {"checkpoints": ("name", "step")}
LISTS |= {name: () for name in ("starts", "events", "results", "changes")}
_ONE_UPDATE = threading.Lock()  # checkpoints are recorded by the thread that writes them
_NO_EVENTS: set[Path] = set()  # records of which it was told that an event could not be noted
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True)
class RunFolder:
    """One version of one run.

    Args:
        path: ``<root>/lightning_logs/<name>/version_N``.
    """

    path: Path

    @property
    def name(self) -> str:
        """``<name>/version_N``, also of a path like ``.``"""
        whole = self.path.resolve()
        return f"{whole.parent.name}/{whole.name}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read(self) -> dict[str, Any]:
        """Return the record: status, checkpoints with step and score, best, last, results."""
        file = self.path / RECORD
        if not file.is_file():
            return {}
        try:
            record = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: the run's record is damaged: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{file}: the run's record is damaged: it is no mapping")
        wrong = [name for name, keys in LISTS.items() if not _is_list(record.get(name, []), keys)]
        if wrong:
            raise UserError(
                f"{file}: the run's record is damaged: {', '.join(wrong)} must be a list of mappings, as this version "
                "writes them; put back a copy of the file"
            )
        return record

    @property
    def directory(self) -> Path:
        """Where the run's last command was typed; its config's relative paths start there. Here, if that is gone."""
        return self.known_directory(self.read()) or Path()

    @staticmethod
    def known_directory(record: Mapping[str, Any]) -> Path | None:
        """Return where the last command of a record was typed, if that is known and still there."""
        commands = record.get("commands")
        last = commands[-1] if isinstance(commands, list) and commands else None
        named = last.get("directory") if isinstance(last, dict) else None
        try:
            return Path(named) if isinstance(named, str) and Path(named).is_dir() else None
        except (OSError, ValueError):  # no name of a folder
            return None

    def update(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries of the record, atomically."""
        unfinished = self.path / f".{RECORD}.{os.getpid()}.unfinished"
        with _ONE_UPDATE:
            record = {**self.read(), **changes, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                with open(unfinished, "w") as handle:
                    json.dump(record, handle, indent=1)
                    handle.flush()
                    os.fsync(handle.fileno())
                unfinished.replace(self.path / RECORD)
            except OSError as error:
                raise UserError(
                    f"{self.path / RECORD}: the run's record cannot be written: {error.strerror}"
                ) from error
            finally:
                unfinished.unlink(missing_ok=True)

    def note_event(self, entry: Mapping[str, Any]) -> None:
        """Append to ``events``; one that cannot be written, as on a full disk, is one warning and stops no run."""
        try:
            self.update({"events": [*self.read().get("events", []), dict(entry)]})
            _NO_EVENTS.discard(self.path)
        except UserError as error:
            if self.path not in _NO_EVENTS:
                log.info("WARNING: %s; training goes on, its events are only in the log", error)
            _NO_EVENTS.add(self.path)

    def checkpoint(self, which: str) -> Path | None:
        """Return the folder of the ``best`` or ``last`` checkpoint, or None if the record has none on disk."""
        name = self.read().get(which)
        path = self.checkpoints / name if name else None
        return path if path is not None and path.is_dir() else None

    def has_checkpoint(self) -> bool:
        """Return whether any checkpoint lies in the folder, in the record or not, whole or not."""
        return any(path.is_dir() for path in self.checkpoints.glob("epoch=*-step=*"))


def _is_list(value: Any, keys: tuple[str, ...]) -> bool:
    """Whether it is a list of mappings that all have these keys."""
    return isinstance(value, list) and all(isinstance(v, dict) and {*keys} <= {*v} for v in value)


def status_of(record: Mapping[str, Any], *, is_owned: bool) -> str:
    """Say what became of a run: finished, running, stopped, failed, killed or empty.

    Args:
        record: ``run.json``.
        is_owned: Whether a process has the folder; of a run recorded as running that none has, it was killed.
    """
    status = str(record.get("status", "empty"))
    if status in ("running", "empty") and is_owned:
        return "running"
    return "killed" if status == "running" else status


def lowered_precision(record: Mapping[str, Any]) -> str | None:
    """Return the safer precision that a run's steps were taken in from some step on, if its own did not do."""
    lowered = [
        e["to"] for e in record.get("events", []) if e.get("kind") == "fallback" and e.get("to")
    ]
    return str(lowered[-1]) if lowered else None


def run_of(trainer: Any) -> RunFolder:
    """Return the run folder a trainer writes to: its first logger's, the same on every rank without asking them.

    (``trainer.log_dir`` is a collective call: on one rank alone it waits for the others for ever.)
    """
    return RunFolder(
        Path(trainer.loggers[0].save_dir if trainer.loggers else trainer.default_root_dir)
    )


def check_name(name: str) -> None:
    """Refuse a run name that could leave the run root or upset a shell.

    Raises:
        UserError: Says which names are allowed.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"name: '{name}' is not allowed; use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )


def versions(root: Path, name: str) -> list[RunFolder]:
    """List the versions of a run, oldest first."""
    found = [
        (int(p.name[8:]), p) for p in (root / LOGS / name).glob("version_*") if p.name[8:].isdigit()
    ]
    return [RunFolder(path) for _, path in sorted(found)]


def new_version(root: Path, name: str) -> RunFolder:
    """Claim the next version's folder.

    Raises:
        UserError: The run root cannot be written.
    """
    number = int(versions(root, name)[-1].path.name[8:]) + 1 if versions(root, name) else 0
    while True:
        path = root / LOGS / name / f"version_{number}"
        try:
            path.mkdir(parents=True, exist_ok=False)
            return RunFolder(path)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"trainer.default_root_dir: '{path}' cannot be made: {error.strerror}"
            ) from error


def run_of_config(configs: list[str]) -> RunFolder | None:
    """Return the run folder a config lies in, if one of the given configs is a run's own."""
    for config in configs:
        if Path(config).name == "config.yaml" and (Path(config).parent / RECORD).is_file():
            return RunFolder(Path(config).parent)
    return None


def unfinished_version(root: Path, name: str) -> RunFolder:
    """Return the one version of a run that can be taken up again.

    Raises:
        UserError: There is none, or several; they are listed.
    """
    candidates = [
        run
        for run in versions(root, name)
        if run.read().get("status") != "finished" and run.has_checkpoint()
    ]
    if len(candidates) == 1:
        return candidates[0]
    listed = "\n".join(f"  {_describe(run)}" for run in versions(root, name)) or "  (no runs)"
    count = "no" if not candidates else str(len(candidates))
    hint = "" if not candidates else "; name one: --config <its config.yaml>"
    raise UserError(
        f"ckpt_path: {count} unfinished run(s) of '{name}' with a checkpoint under {root / LOGS / name}{hint}\n{listed}"
    )


def version_of_job(root: Path, name: str, slurm_job: str) -> RunFolder | None:
    """Return the newest version with a checkpoint that this SLURM job wrote to, or None."""
    of_job = [run for run in versions(root, name) if run.read().get("slurm_job") == slurm_job]
    return next((run for run in reversed(of_job) if run.has_checkpoint()), None)


def newest_with_checkpoint(root: Path, name: str, which: str) -> RunFolder:
    """Return the newest version that has a best or last checkpoint.

    Raises:
        UserError: No version has one; they are listed.
    """
    for run in reversed(versions(root, name)):
        if run.has_checkpoint():
            return run
    listed = "\n".join(f"  {_describe(run)}" for run in versions(root, name)) or "  (no runs)"
    raise UserError(
        f"ckpt_path: no run of '{name}' under {root / LOGS / name} has a {which} checkpoint\n{listed}"
    )


def _describe(run: RunFolder) -> str:
    record = run.read()
    last = record.get("last") or "no checkpoint"
    return f"{run.path}: {record.get('status', 'empty')}, {last}"
