"""Which checkpoints lie in a run folder, in its record or not yet, and which of them is whole.

A kill between a checkpoint's rename and the record of it leaves a whole folder that the record does not know.
"""

import math
import re
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError
from fine_tune.runs.checkpoint import (
    WholeCheck,
    begin_check,
    finish_replacement,
    read_manifest,
)
from fine_tune.runs.run_folder import RunFolder

NAME = re.compile(r"epoch=[\d.]+-step=(\d+)")


def checkpoint_name(epoch: float, step: int) -> str:
    """Return the folder's name, which ``NAME`` recognises."""
    return f"epoch={epoch:.2f}-step={step}"


def stored(run: RunFolder) -> list[dict[str, Any]]:
    """List the checkpoints on disk with ``name``, ``step`` and ``score``, newest first; whole or not."""
    record = run.read()
    listed = {c["name"]: c for c in record.get("checkpoints", [])}
    for hidden in run.checkpoints.glob(".*.replaced"):
        finish_replacement(hidden.with_name(hidden.name[1 : -len(".replaced")]))
    found = []
    for folder in run.checkpoints.glob("*"):
        match = NAME.fullmatch(folder.name)
        if folder.is_dir() and folder.name in listed:
            found.append(listed[folder.name])
        elif folder.is_dir() and match and folder.name not in record.get("rotated", []):
            found.append(
                {"name": folder.name, "step": int(match[1]), "score": _score_in_manifest(folder)}
            )
    return sorted(found, key=lambda c: -int(c["step"]))


def ranked(checkpoints: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Return those with a finite score, the best first; among equals the earlier."""
    sign = 1 if mode == "min" else -1
    scored = [c for c in checkpoints if c.get("score") is not None and math.isfinite(c["score"])]
    return sorted(scored, key=lambda c: (sign * float(c["score"]), c["step"]))


def newest_whole(
    run: RunFolder, which: str, *, at_once: bool = True
) -> tuple[Path, list[str], WholeCheck]:
    """Find the ``best`` or ``last`` checkpoint that is whole.

    Args:
        run: The run.
        which: ``best`` or ``last``.
        at_once: Wait for its check; else damage shows when it is read.

    Returns:
        Its folder, a line for each better or newer one that was refused, and why, and its check.

    Raises:
        UserError: None is whole; each is named with what is wrong with it.
    """
    candidates = stored(run)
    if which == "best":
        scored = ranked(candidates, run.read().get("mode", "min"))
        candidates = scored + [c for c in candidates if c not in scored]
    refused: list[str] = []
    for candidate in candidates:
        folder = run.checkpoints / candidate["name"]
        try:
            check = begin_check(folder, at_once=at_once)
        except UserError as error:
            refused += error.problems
            continue
        taken = f"{which}: using '{folder}' (step {candidate['step']}) instead"
        return folder, [*refused, taken] if refused else [], check
    raise UserError(*refused or [f"ckpt_path: {run.path} has no {which} checkpoint"])


def _score_in_manifest(folder: Path) -> float | None:
    try:
        score = read_manifest(folder).get("score")
    except UserError:
        return None
    return None if score is None else float(score)
