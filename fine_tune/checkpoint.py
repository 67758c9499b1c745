"""A checkpoint is a folder: Hugging Face files, the training state, and a manifest of SHA-256 sums.

It is whole or not there: written beside its name, flushed to disk, hashed, then renamed. Nothing loaded executes code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from fine_tune.errors import UserError

TRAINING_STATE = "training_state.pt"
MANIFEST = "manifest.json"


class FolderCheckpointIO(CheckpointIO):
    """Write and read checkpoint folders for Lightning.

    Args:
        export: Writes the model's files into a folder, given the trained weights.
    """

    def __init__(self, export: Callable[[Path, dict[str, Tensor]], None]) -> None:
        self.export = export

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write the folder ``path``; what was there before goes only once the new one is whole."""
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.export(unfinished, checkpoint["state_dict"])
        state = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        torch.save(state, unfinished / TRAINING_STATE)
        files = sorted(p for p in unfinished.rglob("*") if p.is_file())
        sums = {str(file.relative_to(unfinished)): _sha256(file) for file in files}
        (unfinished / MANIFEST).write_text(
            json.dumps({"global_step": checkpoint["global_step"], "sha256": sums}, indent=1)
        )
        for file in [*files, unfinished / MANIFEST, unfinished]:
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
        _flush(target.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the training state of a whole checkpoint; the weights follow from its ``folder``.

        Raises:
            UserError: It is not a checkpoint folder, or a file in it is missing or changed.
        """
        folder = Path(path)
        check_whole(folder)
        state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
        return {**state, "state_dict": {}, "folder": str(folder)}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint folder; it loses its name first, so that half a folder is never found."""
        folder = Path(path)
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.removed")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def global_step(folder: Path) -> int:
    """Return the optimizer steps a whole checkpoint has seen, whatever its folder is called."""
    return int(json.loads((folder / MANIFEST).read_text())["global_step"])


def check_whole(folder: Path) -> None:
    """Compare a checkpoint folder with its manifest.

    Raises:
        UserError: Names the file that is missing or whose content changed.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"ckpt_path: '{folder}' is not a checkpoint of this project (it has no {MANIFEST})"
        )
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"ckpt_path: '{folder / MANIFEST}' is damaged; use another checkpoint"
        ) from error
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise UserError(f"ckpt_path: '{folder / name}' is missing; use another checkpoint")
        if _sha256(folder / name) != expected:
            raise UserError(
                f"ckpt_path: '{folder / name}' is damaged (its SHA-256 changed); use another checkpoint"
            )


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
