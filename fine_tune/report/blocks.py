"""What a report is made of, for the page and for the text alike."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fine_tune.report.observations import Tone


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; columns after the first ``num_text`` hold numbers.

    Args:
        head: Names of the columns.
        rows: Cells as texts.
        num_text: Columns of text, on the left.
        title: Stands above it.
        note: Stands below it.
        marked: Rows to be marked.
        mark: As what.
        bars: The column that is drawn as bars.
        stacks: On a phone each row becomes a block of named lines: for long texts.
    """

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[str]]
    num_text: int = 1
    title: str = ""
    note: str = ""
    marked: frozenset[int] = frozenset()
    mark: Literal["best", "differs"] = "best"
    bars: int = -1
    stacks: bool = False


@dataclass(frozen=True)
class Sentences:
    """Sentences, each with how it reads."""

    kind: ClassVar[str] = "sentences"
    items: list[tuple[Tone, str]]


@dataclass(frozen=True)
class Charts:
    """Drawings as SVG, each with its title and what it shows in words."""

    kind: ClassVar[str] = "charts"
    drawn: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Code:
    """Commands, one a line, with what they do."""

    kind: ClassVar[str] = "code"
    title: str
    lines: list[str]


Block = Facts | Table | Sentences | Charts | Code


@dataclass(frozen=True)
class Section:
    """A part of the report under one title."""

    key: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Card:
    """A headline number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Args:
        language: For the page's ``lang``.
        title: The run's name, or those of several.
        status: One word for the badge.
        tone: Of the badge.
        lead: Purpose, and what became of the run.
        cards: Headline numbers.
        sections: In their order.
        footer: How it was made.
    """

    language: str
    title: str
    status: str
    tone: Tone
    lead: list[str]
    cards: list[Card]
    sections: list[Section]
    footer: str
    warnings: list[str] = field(default_factory=list)
