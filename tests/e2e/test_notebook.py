"""The notebook runs as it is, on the quickstart."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from harness import REPOSITORY
from nbclient import NotebookClient


@pytest.mark.timeout(600)
def test_the_notebook_installs_analyzes_fits_and_shows_results(tmp_path: Path) -> None:
    for name in ("configs", "fine_tune"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    notebook = nbformat.read(REPOSITORY / "notebooks" / "colab.ipynb", as_version=4)
    assert len(notebook.cells) == 4
    assert all(not cell.outputs for cell in notebook.cells)  # shipped clean
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    _, analyzed, fitted, shown = ("".join(map(_text, cell.outputs)) for cell in notebook.cells)
    assert "tokens per row" in analyzed
    assert "finished: step 980 of 980" in fitted
    assert "test/exact_match" in shown
    assert "Jakarta" in shown
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[3].outputs)


def _text(output: Any) -> str:
    return str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
