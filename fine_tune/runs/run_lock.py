"""A run folder has one owner: the first process of fit, validate or test that writes there."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import filelock
import psutil

from fine_tune.errors import UserError
from fine_tune.runs import slurm

log = logging.getLogger("fine_tune")
LOCK, OWNER = ".lock", ".owner.json"
TAKE_OVER_VARIABLE = "FINE_TUNE_TAKE_OVER"  # by a sweep: an owner on another machine is gone
ORPHANS_SECONDS = 20.0  # data workers of a killed process hold its lock until they notice
QUIET_SECONDS = 15 * 60.0  # without a word of an owner on another machine
WRITTEN = (OWNER, "run.json", "metrics.csv", "train.log")  # while a run goes on


class RunLock:
    """Own a run folder from ``__init__`` to ``release``.

    The lock is the kernel's (``flock``), so it ends with the process however that ends. ``.owner.json`` beside it says
    who holds it. A record left behind by a process of this machine, or by an earlier start of the same SLURM job, is
    stale and taken over; one of another machine cannot be looked into, and is refused, but for a sweep, which knows
    when a worker is gone.

    Args:
        folder: The run folder.
        verb: fit, validate or test.

    Raises:
        UserError: Another process owns the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self._owner = folder, folder / OWNER
        self._lock = filelock.FileLock(str(folder / LOCK))
        try:
            self._take()
            self._write_owner(verb)
        except OSError as error:
            raise UserError(
                f"run folder '{folder}' cannot be written: {error.strerror}; it needs write access and free space"
            ) from error

    def release(self) -> None:
        """Give the folder back."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = self._read_owner()
            if _alive(owner):
                raise UserError(self._in_use(owner)) from None
            try:
                self._lock.acquire(timeout=ORPHANS_SECONDS)
            except filelock.Timeout:
                raise UserError(self._in_use(self._read_owner())) from None
        owner = self._read_owner()
        if not owner:
            return
        same_job = owner.get("slurm_job") is not None and owner["slurm_job"] == slurm.job_id()
        known_gone = same_job or TAKE_OVER_VARIABLE in os.environ
        if owner.get("host") != socket.gethostname() and not known_gone:
            self._lock.release()
            raise UserError(
                f"{self._in_use(owner)}; whether it still runs cannot be seen from here: if it does not, "
                f"remove '{self._owner}'"
            )
        log.info("took over the lock of process %s, which is gone", owner.get("pid"))

    def _in_use(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        what = f"{owner.get('verb', '?')}, since {owner.get('since', '?')}"
        return f"run folder '{self.folder}' is in use by {who} ({what})"

    def _read_owner(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._owner.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError):  # cut off by a crash of this machine
            return {"host": socket.gethostname()}

    def _write_owner(self, verb: str) -> None:
        unfinished = self._owner.with_name(f"{OWNER}.unfinished")
        owner = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "host": socket.gethostname(),
            "verb": verb,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "slurm_job": slurm.job_id(),
        }
        unfinished.write_text(json.dumps(owner))
        unfinished.replace(self._owner)


def is_owned(folder: Path) -> bool:
    """Whether a process owns a run folder, as far as this machine can tell; nothing is written.

    A process on another machine cannot be looked into. It is gone if nothing was written for ``QUIET_SECONDS`` and
    nobody holds the lock; neither alone is enough: a step can be slow, and not every storage shares its locks.
    """
    try:
        owner = dict(json.loads((folder / OWNER).read_text()))
        elsewhere = owner.get("host") != socket.gethostname()
        if elsewhere and _is_quiet(folder) and _is_free(folder / LOCK):
            return False
        return _alive(owner)
    except (OSError, ValueError, TypeError):
        return False


def _is_quiet(folder: Path) -> bool:
    files = [file for name in WRITTEN if (file := folder / name).exists()]
    return time.time() - max(file.stat().st_mtime for file in files) > QUIET_SECONDS


def _is_free(lock: Path) -> bool:
    """Whether nobody holds a lock: it can be shared, for an instant."""
    try:
        with open(lock, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back by closing
    except FileNotFoundError:
        return True
    except OSError:  # held, or a storage without locks
        return False
    return True


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the owner may still run: as far as this machine can tell, and not another process with its number."""
    if not owner or owner.get("host") != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1
    except (psutil.Error, KeyError):
        return False
