"""Where a run writes, and the checkpoint it starts from."""

import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.runs import run_folder as runs
from fine_tune.runs.checkpoint import WholeCheck, begin_check, finish_replacement, global_step
from fine_tune.runs.identity import MANIFEST
from fine_tune.runs.links import refuse_links
from fine_tune.runs.stored_checkpoints import newest_whole, stored

RUN_VARIABLE = (
    "FINE_TUNE_RUN_FOLDER"  # tells the processes a strategy starts which folder the first one took
)
PARENT_VARIABLE = "FINE_TUNE_PARENT"  # the process a run of a sweep ends with


@dataclass(frozen=True)
class Place:
    """Where to write and what to start from.

    Args:
        run: The run folder to go on in; None: a new version.
        checkpoint: The checkpoint to start from; None: none.
        notes: What the user must know: which checkpoint was refused, and which is used instead.
        check: Compares the checkpoint's files with its manifest, from now on or since before.
    """

    run: runs.RunFolder | None
    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)
    check: WholeCheck | None = None

    @cached_property
    def step(self) -> int:
        """Optimizer steps the checkpoint has seen; kept, since training removes checkpoints that newer ones replace."""
        return global_step(self.checkpoint) if self.checkpoint is not None else 0


def find_place(
    verb: str,
    ckpt_path: str | None,
    *,
    name: str,
    root: Path,
    configs: list[str],
    at_once: bool = True,
) -> Place:
    """Resolve ``best``, ``last`` or a path; for the first two a damaged checkpoint is passed over.

    ``fit`` goes on in the folder of the last checkpoint; from any other it starts a new version, so that nothing
    recorded after it is lost. ``validate`` and ``test`` write into the folder of the checkpoint, ``predict`` into none.

    Args:
        verb: fit, validate, test or predict.
        ckpt_path: What the user gave.
        name: The run's name.
        root: Folder that holds ``lightning_logs``.
        configs: YAML files of the command line; one inside a run folder names that run.
        at_once: Wait until the checkpoint's files are compared with its manifest; else damage shows when it is read.

    Raises:
        UserError: No such checkpoint, a damaged one, or several runs it could be.
    """
    if ckpt_path is None:
        own = runs.run_of_config(configs)
        if verb == "fit" or own is None or not own.has_checkpoint():
            return Place(None, None)
        ckpt_path = "best"  # the config of a run means the run
    if ckpt_path not in ("best", "last"):
        return _place_of_path(verb, Path(ckpt_path), at_once)
    own = runs.run_of_config(configs)
    if not is_first_process() and RUN_VARIABLE in os.environ:
        own = runs.RunFolder(Path(os.environ[RUN_VARIABLE]))
    if own is None and verb == "fit":
        own = runs.unfinished_version(root, name)
    if own is None:
        own = runs.newest_with_checkpoint(root, name, ckpt_path)
    checkpoint, notes, check = newest_whole(own, ckpt_path, at_once=at_once)
    return _place(verb, own, checkpoint, check, is_last=ckpt_path == "last", notes=notes)


def claim(place: Place, name: str, root: Path) -> runs.RunFolder:
    """Take the run folder to write to; the processes started after the first one take the same."""
    if (
        not is_first_process()
    ):  # it writes nothing; which folder the first one took is told after fit
        return place.run or runs.RunFolder(
            Path(os.environ.get(RUN_VARIABLE, root / runs.LOGS / name))
        )
    named = place.run.path.absolute().parent if place.run is not None else root / runs.LOGS / name
    refuse_links(named, place.run)
    run = place.run or runs.new_version(root, name)
    check_writable(run.path)
    os.environ[RUN_VARIABLE] = str(run.path)
    return run


def check_writable(folder: Path) -> None:
    """Try to write into a folder that exists, or into the nearest one above it that does.

    Raises:
        UserError: It cannot be written.
    """
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir: '{existing}' cannot be written: {error.strerror}; give another folder"
        ) from error


def is_first_process() -> bool:
    """Whether this process has rank 0, told by the environment before any process group exists."""
    ranks = (os.environ.get(key) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


def _place_of_path(verb: str, checkpoint: Path, at_once: bool) -> Place:
    finish_replacement(checkpoint)
    if not checkpoint.is_dir():
        folders = (file.parent for file in checkpoint.parent.glob(f"*/{MANIFEST}"))
        beside = sorted(p.name for p in folders if p.name[0] != ".")
        listed = f"; there are {', '.join(beside)}" if beside else ""
        raise UserError(f"ckpt_path: '{checkpoint}' does not exist{listed}; or give best or last")
    check = begin_check(checkpoint, at_once=at_once)
    return _place(verb, runs.RunFolder(checkpoint.resolve().parent.parent), checkpoint, check)


def _place(
    verb: str,
    run: runs.RunFolder,
    checkpoint: Path,
    check: WholeCheck,
    *,
    is_last: bool = False,
    notes: list[str] | None = None,
) -> Place:
    newest = [run.checkpoints / found["name"] for found in stored(run)[:1]]
    is_last = is_last or [path.resolve() for path in newest] == [checkpoint.resolve()]
    continues = bool(run.read()) and (verb != "fit" or is_last)
    return Place(run if continues else None, checkpoint.resolve(), notes or [], check)
