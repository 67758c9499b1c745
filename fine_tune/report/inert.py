"""Text from rows, names and models, made harmless for a page, for Markdown, and for a spreadsheet it is pasted into."""

import re

from fine_tune.printable import JOINERS, printable

_MARKDOWN = re.compile(
    r"[\\`*\[\]|~$#!]|(?<![^\W_])_|_(?![^\W_])"
)  # an underscore within a word is a word's
_FORMULA = re.compile(r"\s*[=@+\-]")
_NUMBER = re.compile(r"\s*[+\-]?[\d.,]+(?:e[+\-]?\d+)?\s*%?", re.IGNORECASE)


def plain(text: object) -> str:
    """Return text with control characters written out, and nothing a spreadsheet would take for a formula.

    ``=cmd()`` becomes ``'=cmd()``: a program that pastes the cell shows it as it is. Ends of lines stay, and what
    stands behind one is pasted as a cell of its own.
    """
    return "\n".join(map(_inert, printable(str(text), "\n" + JOINERS).split("\n")))


def _inert(line: str) -> str:
    is_formula = _FORMULA.match(line) and not _NUMBER.fullmatch(line) and len(line.strip()) > 1
    return f"'{line}" if is_formula else line


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line: no HTML, link, image, code, table cell or mention."""
    shown = plain(text).replace("\n", " ")
    shown = _MARKDOWN.sub(lambda found: f"\\{found[0]}", shown)
    for character, written in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}.items():
        shown = shown.replace(character, written)
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;")


def markdown_code(lines: list[str]) -> str:
    """Return lines as a block of code, fenced by more backticks than any of them has."""
    shown = [printable(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}text", *shown, fence])
