"""Write a run's report into its folder, or the comparison of several."""

import os
from contextlib import suppress
from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.report import render
from fine_tune.report.blocks import Page
from fine_tune.report.compare import MOST_RUNS, comparison_of
from fine_tune.report.page import page_of
from fine_tune.report.record import read_run
from fine_tune.report.words import Language, Words

NAME, NAME_OF_SEVERAL = "report", "comparison"


def write_report(
    folder: Path,
    language: Language = "en",
    every: int | None = None,
    grid: float | None = None,
    output: Path | None = None,
) -> Path:
    """Write ``report.html`` and ``report.md`` of a run; return the page's path.

    Args:
        folder: The run folder.
        language: en or id.
        every: Steps between two rows of the table of steps; None: as many as keep it short.
        grid: Grams of CO2e per kWh of electricity.
        output: Folder to write into; None: the run's.

    Raises:
        UserError: The folder cannot be written, or holds a file of this name that is no report of ours.
    """
    words = Words(language)
    page = page_of(read_run(folder), words, every, grid)
    return write_page(page, words, folder / NAME if output is None else _free(output / NAME))


def write_comparison(
    folders: list[Path], language: Language = "en", output: Path | None = None
) -> Path:
    """Write ``comparison.html`` and ``comparison.md`` of several runs; return the page's path.

    Args:
        folders: The run folders.
        language: en or id.
        output: Folder to write into; None: that of the first run.

    Raises:
        UserError: Too many runs for one page, or the folder cannot be written or holds another file of this name.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(
            f"run: {len(folders)} runs are given, at most {MOST_RUNS} stand side by side"
        )
    words = Words(language)
    page = comparison_of([read_run(folder) for folder in folders], words)
    several = NAME_OF_SEVERAL
    return write_page(
        page, words, folders[0] / several if output is None else _free(output / several)
    )


def write_page(page: Page, words: Words, file: Path) -> Path:
    """Write a page as ``.html`` and ``.md``; return the former."""
    _replace(file.with_suffix(".md"), render.text(page, words))
    _replace(file.with_suffix(".html"), render.html(page, words))
    return file.with_suffix(".html")


def _free(file: Path) -> Path:
    """Return the place, unless somebody else's file is there."""
    for there in (file.with_suffix(".md"), file.with_suffix(".html")):
        if there.is_file() and render.MARK not in there.read_text("utf-8", errors="replace"):
            raise UserError(
                f"output: '{there}' is no report of this project and is not overwritten; name another folder"
            )
    return file


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        unfinished.replace(file)
    except OSError as error:
        raise UserError(
            f"{file}: the report cannot be written: {error.strerror}; name another folder: --output"
        ) from error
    finally:
        with suppress(OSError):  # most often there is none, or no folder that could hold one
            unfinished.unlink()
