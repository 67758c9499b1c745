"""Where a run comes from: what it is, what was changed on the way, its parents, the commands that made it."""

import logging
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from fine_tune.modules.run_identity import STEPS, Change, differences, refuse_another_run
from fine_tune.redaction import redacted
from fine_tune.runs.identity import IDENTITY_FILE, identity_hash, read_identity, write_identity
from fine_tune.runs.lineage import parent_of, read_tokenizer_origin
from fine_tune.runs.places import Place
from fine_tune.runs.run_folder import RunFolder

log = logging.getLogger("fine_tune")


def check_same_run(place: Place, identity: dict[str, Any], allow_changes: bool) -> list[Change]:
    """Hold the run that would go on against the checkpoint's, before weights load and before anything is written.

    Args:
        place: Where ``fit`` would go on.
        identity: What the run would be.
        allow_changes: Go on with another run's settings all the same.

    Returns:
        What differs, all of it allowed.

    Raises:
        UserError: What differs and is not allowed.
    """
    if place.checkpoint is None:
        return []
    then = read_identity(place.checkpoint)
    if then is None:  # written in shards by a strategy of its own
        then = RunFolder(place.checkpoint.parent.parent).read().get("identity")
    if then is None:
        log.info(
            "WARNING: %s has no %s: its settings are not compared", place.checkpoint, IDENTITY_FILE
        )
        return []
    changes = differences(then, identity)
    if not allow_changes:
        refuse_another_run(changes)
    for change in changes:
        log.info("%s%s", "" if change.allowed else "WARNING: ", change)
    return changes


def record_origin(
    run: RunFolder,
    place: Place,
    identity: dict[str, Any],
    changes: list[Change],
    *,
    model: str | None,
    tokenizer: str | None,
    command: list[str],
) -> None:
    """Write into ``run.json`` what the run is, what changed at which step, its parents, and the command.

    Args:
        run: The claimed folder.
        place: Where it goes on; changes recorded at later steps were undone with them.
        identity: What it is.
        changes: What is not as in the checkpoint.
        model: The folder or name its weights come from.
        tokenizer: The same of its tokenizer.
        command: The arguments given.
    """
    record, step = run.read(), place.step
    made = [
        {
            "step": step,
            "key": change.key,
            "from": change.before,
            "to": change.now,
            "allowed_by": _allowed_by(change),
        }
        for change in changes
    ]
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    launch = {"time": started, "from_step": step, "command": without_secrets(command)}
    continued = place.checkpoint if place.run is None else None
    run.update(
        {
            "identity": identity,
            "identity_hash": identity_hash(identity),
            "changes": [c for c in record.get("changes", []) if c["step"] < step] + made,
            "parents": record.get("parents") or _parents(model, continued),
            "tokenizer_origin": read_tokenizer_origin(tokenizer),
            "commands": [*record.get("commands", []), {**launch, "directory": os.getcwd()}],
        }
    )


def with_identity(
    export: Callable[[Path, dict[str, Tensor]], None], identity: dict[str, Any]
) -> Callable[[Path, dict[str, Tensor]], None]:
    """Let an export of a model's files into a checkpoint also write what the run is."""

    def export_both(folder: Path, weights: dict[str, Tensor]) -> None:
        export(folder, weights)
        write_identity(folder, identity)

    return export_both


def _allowed_by(change: Change) -> str:
    if not change.allowed:
        return "--allow_changes"
    return "being longer" if change.key == STEPS else "being free to change"


def without_secrets(args: list[str]) -> list[str]:
    """Return arguments with the values of secret-looking environment variables replaced."""
    return [redacted(arg) for arg in args]


def _parents(model: str | None, continued: Path | None) -> list[dict[str, Any]]:
    given = {"weights": Path(model) if model else None, "training state": continued}
    found = [parent_of(gave, path) for gave, path in given.items() if path is not None]
    return [parent for parent in found if parent is not None]
