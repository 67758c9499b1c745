"""Saves of a few numbers through the real writer, without a model or a trainer: the step is in every value."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fine_tune.callbacks.checkpoints import Checkpoints
from fine_tune.runs.checkpoint import read_state
from fine_tune.runs.checkpoint_io import FolderCheckpointIO, Saving
from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.stored_checkpoints import checkpoint_name


def state_of(step: int, numbers: int = 64) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": {"weight": torch.full((numbers,), float(step))},
        "optimizer_states": [{"momentum": torch.full((numbers,), float(step))}],
    }


def export(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    with open(folder / "config.json", "w") as handle:
        handle.write(json.dumps({"numbers": 64}))
    save_file(state_dict, folder / "model.safetensors")


def save(run: RunFolder, step: int, io: FolderCheckpointIO | None = None, size: int = 64) -> None:
    """Write, record and rotate as training does, and wait for it."""
    io = io or FolderCheckpointIO(export)
    keeper = Checkpoints(keep=1)
    saved = {"name": checkpoint_name(step, step), "step": step, "score": float(-step)}
    how = Saving(
        facts={"score": saved["score"]},
        written=lambda measured: keeper._record(run, {**saved, **measured}),
    )
    io.save_checkpoint(state_of(step, size), run.checkpoints / str(saved["name"]), how)
    io.wait()


def step_of(folder: Path) -> int:
    """Return the step that every value of a checkpoint agrees on."""
    state = read_state(folder)
    weight = load_file(folder / "model.safetensors")["weight"]
    momentum = state["optimizer_states"][0]["momentum"]
    values = {int(state["global_step"]), *weight.int().tolist(), *momentum.int().tolist()}
    assert len(values) == 1, values
    return values.pop()
