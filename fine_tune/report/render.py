"""Page and text from their templates; every text in them is made harmless on its way in."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fine_tune.printable import printable
from fine_tune.report import inert
from fine_tune.report.blocks import Page
from fine_tune.report.words import Words

TEMPLATES = Path(__file__).parent / "templates"
MARK = "a report of fine_tune"  # in both templates; a file without it is not replaced


def html(page: Page, words: Words) -> str:
    """Return the page: one file, no script, nothing from elsewhere."""
    environment = _environment(autoescape=True)
    environment.finalize = lambda value: value if isinstance(value, Markup) else inert.plain(value)
    environment.filters["drawing"] = Markup  # made by charts.py, without text of the user's
    environment.filters["code"] = printable
    style = Markup((TEMPLATES / "style.css").read_text("utf-8"))
    return environment.get_template("report.html.j2").render(page=page, words=words, style=style)


def text(page: Page, words: Words) -> str:
    """Return the same as Markdown, without the drawings."""
    environment = _environment(autoescape=False)
    environment.finalize = lambda value: (
        value if isinstance(value, Markup) else inert.markdown(value)
    )
    environment.filters["ours"] = Markup  # made of escaped cells
    environment.filters["fenced"] = lambda lines: Markup(inert.markdown_code(lines))
    return environment.get_template("report.md.j2").render(page=page, words=words)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
