"""``validation_rows.npy`` of a run: the loss of each validation row under its best weights."""

from contextlib import suppress

import numpy as np

from fine_tune.errors import UserError
from fine_tune.runs.run_folder import RunFolder

ROW_LOSSES = "validation_rows.npy"


def write_row_losses(run: RunFolder, losses_R3: np.ndarray) -> None:
    """Write id, count and summed loss of each row.

    Raises:
        UserError: The folder cannot be written, or is full.
    """
    file, unfinished = run.path / ROW_LOSSES, run.path / f".{ROW_LOSSES}.unfinished"
    try:
        with open(unfinished, "wb") as handle:
            np.save(handle, losses_R3)
        unfinished.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read_row_losses(run: RunFolder) -> np.ndarray | None:
    """Return what ``write_row_losses`` wrote; None where there is nothing, or nothing whole."""
    try:
        losses_R3 = np.load(run.path / ROW_LOSSES, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return losses_R3 if losses_R3.ndim == 2 and losses_R3.shape[1] == 3 else None
