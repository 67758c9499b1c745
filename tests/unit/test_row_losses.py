"""The losses of a run's rows: written whole or not at all, and a full disk is the user's to mend."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fine_tune.errors import UserError
from fine_tune.runs import row_losses
from fine_tune.runs.row_losses import ROW_LOSSES, read_row_losses, write_row_losses
from fine_tune.runs.run_folder import RunFolder


def test_a_full_disk_is_told_and_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = RunFolder(tmp_path), np.array([[0.0, 2.0, 1.5], [1.0, 3.0, 2.5]])
    write_row_losses(run, before)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_losses.np, "save", full)
    with pytest.raises(UserError, match=r"validation_rows.npy: cannot be written: No space left"):
        write_row_losses(run, before + 1)
    assert np.array_equal(read_row_losses(run), before)  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == [ROW_LOSSES]


def test_a_file_cut_off_is_no_losses(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_row_losses(run) is None
    write_row_losses(run, np.zeros((100, 3)))
    file = tmp_path / ROW_LOSSES
    file.write_bytes(file.read_bytes()[:-8])
    assert read_row_losses(run) is None
