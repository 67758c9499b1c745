"""A report as a reader finds it: facts, tables, sentences and commands by section, parsed from its page."""

from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "path", "use", "img", "rect", "line"}


@dataclass
class Part:
    """One section of the page."""

    facts: dict[str, str] = field(default_factory=dict)
    tables: list[list[list[str]]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    drawings: int = 0
    chart_texts: list[str] = field(default_factory=list)


class ReportPage(HTMLParser):
    """Reads a page; ``tags`` counts its elements, ``links`` lists everything it names elsewhere."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text("utf-8")
        self.parts: dict[str, Part] = defaultdict(Part)
        self.tags: dict[str, int] = defaultdict(int)
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.texts: dict[str, str] = defaultdict(str)  # by element and class, outside of sections
        self._open: list[tuple[str, str]] = []
        self._section, self._name = "", ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.links += [v for k, v in given.items() if k.split(":")[-1] in ("href", "src", "action")]
        self.handlers += [k for k in given if k.startswith("on")]
        part = self.parts[self._section]
        if tag == "section":
            self._section = given["id"]
        elif tag == "table":
            part.tables.append([])
        elif tag == "tr":
            part.tables[-1].append([])
        elif tag in ("td", "th"):
            part.tables[-1][-1].append("")
        elif tag == "li":
            part.told.append("")
        elif tag == "code":
            part.code.append("")
        elif tag == "figcaption":
            part.charts.append("")
        elif tag == "svg":
            part.drawings += 1
        if tag not in VOID:
            self._open.append((tag, given.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        (tag, kind), part = self._open[-1], self.parts[self._section]
        if tag == "dt":
            self._name = data
        elif tag == "dd":
            part.facts[self._name] = part.facts.get(self._name, "") + data
        elif tag in ("td", "th"):
            part.tables[-1][-1][-1] += data
        elif tag == "li":
            part.told[-1] += data
        elif tag == "code":
            part.code[-1] += data
        elif tag == "figcaption":
            part.charts[-1] += data
        elif tag == "text":
            part.chart_texts.append(data)
        else:
            self.texts[f"{tag}.{kind}"] += data

    def rows(self, section: str, table: int = 0) -> list[dict[str, str]]:
        """Return a table's rows by the names of its columns."""
        head, *rows = self.parts[section].tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]
