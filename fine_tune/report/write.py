"""Write a run's report into its folder."""

from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.report import render
from fine_tune.report.page import page_of
from fine_tune.report.record import read_run
from fine_tune.report.words import Language, Words

HTML, TEXT = "report.html", "report.md"


def write_report(
    folder: Path, language: Language = "en", every: int | None = None, grid: float | None = None
) -> Path:
    """Write ``report.html`` and ``report.md`` of a run; return the page's path.

    Args:
        folder: The run folder.
        language: en or id.
        every: Steps between two rows of the table of steps; None: as many as keep it short.
        grid: Grams of CO2e per kWh of electricity.

    Raises:
        UserError: The folder cannot be written.
    """
    words = Words(language)
    page = page_of(read_run(folder), words, every, grid)
    replace(folder / TEXT, render.text(page, words))
    replace(folder / HTML, render.html(page, words))
    return folder / HTML


def replace(file: Path, text: str) -> None:
    """Write a file beside its name, then give it its name."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        unfinished.replace(file)
    except OSError as error:
        raise UserError(f"{file}: the report cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
