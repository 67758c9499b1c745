"""Models and rows that the comparisons share; one run root, so that rows are tokenized once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from parity_runs import NUM_ROWS, make_rows, write_model, write_rows

from fine_tune.runs.places import RUN_VARIABLE


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of the session write."""
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="session")
def small_model(root: Path) -> Callable[[str], Path]:
    """Return the folder of the small random model of an architecture."""
    return cache(lambda architecture: write_model(root / architecture, architecture))


@pytest.fixture(scope="session")
def prompt_rows(root: Path) -> Path:
    """Rows with a prompt that carries no loss."""
    return write_rows(root / "prompt_rows.jsonl", make_rows(NUM_ROWS))


@pytest.fixture(scope="session")
def text_rows(root: Path) -> Path:
    """The same rows as plain text, where every token carries loss."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in make_rows(NUM_ROWS)]
    return write_rows(root / "text_rows.jsonl", rows)
