"""``validation_rows.npy`` of a run: the loss of each validation row under its best weights."""

import numpy as np

from fine_tune.runs.run_folder import RunFolder

ROW_LOSSES = "validation_rows.npy"


def write_row_losses(run: RunFolder, losses_R3: np.ndarray) -> None:
    """Write id, count and summed loss of each row."""
    unfinished = run.path / f".{ROW_LOSSES}.unfinished"
    with open(unfinished, "wb") as handle:
        np.save(handle, losses_R3)
    unfinished.replace(run.path / ROW_LOSSES)


def read_row_losses(run: RunFolder) -> np.ndarray | None:
    """Return what ``write_row_losses`` wrote; None where there is nothing, or nothing whole."""
    try:
        losses_R3 = np.load(run.path / ROW_LOSSES, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return losses_R3 if losses_R3.ndim == 2 and losses_R3.shape[1] == 3 else None
