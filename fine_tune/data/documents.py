"""Texts of any size, one document after the other: files are streamed and never lie in memory whole.

Before the straight line of rows: ``train-tokenizer`` and pretraining read this.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as parquet

from fine_tune.data.files import KINDS, broken_lines, json_rows, lines_of, parse_json
from fine_tune.errors import UserError

Unit = Literal["line", "paragraph", "file"]
LARGEST_FILE = 2**30  # bytes of a text that is one document
PARQUET_ROWS = 1_000


@dataclass(frozen=True)
class Document:
    """A text and where it stands.

    Args:
        text: As written; never blank.
        where: ``file:line``, or ``file: row n`` where the format has no lines.
        fields: What else its row has.
    """

    text: str
    where: str
    fields: dict[str, Any]


def text_files(path: str, key: str = "data.path") -> list[Path]:
    """Return the files of texts that a path names: the file itself, or those of a folder, by name.

    Raises:
        UserError: There are none.
    """
    place = Path(path)
    if place.is_file() and place.suffix not in KINDS:
        raise UserError(f"{key}: '{path}': unknown kind of file; known: {', '.join(KINDS)}")
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{key}: '{path}' does not exist; give a file or a folder of texts")
    files = sorted(p for p in place.rglob("*") if p.suffix in KINDS and p.is_file())
    if not files:
        raise UserError(f"{key}: folder '{path}' holds no text; known kinds: {', '.join(KINDS)}")
    return files


def documents(files: list[Path], field: str = "text", unit: Unit = "line") -> Iterator[Document]:
    """Give the documents of files, in order.

    Args:
        files: What ``text_files`` returned.
        field: Where a row of JSON, CSV or Parquet holds its text.
        unit: What is one document of a ``.txt``: a line, a paragraph (up to a blank line), or the whole file.

    Raises:
        UserError: Not UTF-8, broken rows, rows without the field: file and line.
    """
    for file in files:
        reader = {".txt": _of_text, ".parquet": _of_parquet, ".jsonl": _of_lines}.get(file.suffix)
        try:
            found = (
                _of_text(file, unit) if reader is _of_text else (reader or _of_table)(file, field)
            )
            yield from (document for document in found if document.text.strip())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: not UTF-8 (byte {error.object[error.start]:#x}); it is another encoding, or no text at all: "
                "convert it, or leave it out"
            ) from error


def _of_text(file: Path, unit: str) -> Iterator[Document]:
    if unit == "file":
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{file}: more than {LARGEST_FILE / 2**30:g} GiB is too much for one document; take "
                "data.document: line or paragraph"
            )
        yield Document(file.read_text("utf-8-sig"), f"{file}:1", {})
        return
    held: list[str] = []
    first = 0
    with open(file, "rb") as handle:
        for number, raw in enumerate(handle, start=1):
            line = _decoded(file, number, raw)
            if unit == "line":
                yield Document(line.rstrip("\r\n"), f"{file}:{number}", {})
            elif line.strip():
                first = first if held else number
                held.append(line)
            elif held:
                yield Document("".join(held).rstrip("\r\n"), f"{file}:{first}", {})
                held = []
    if held:
        yield Document("".join(held).rstrip("\r\n"), f"{file}:{first}", {})


def _decoded(file: Path, number: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number}: not UTF-8 (byte {error.object[error.start]:#x} at {error.start}); it is another "
            "encoding, or no text at all: convert it, or leave it out"
        ) from error


def _of_lines(file: Path, field: str) -> Iterator[Document]:
    for number, line in lines_of(file):
        where = f"{file}:{number}"
        try:
            row = parse_json(_decoded(file, number, line))
        except ValueError as error:
            told = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{where}: broken JSON: {told}") from error
        yield _document(row, field, where)


def _of_parquet(file: Path, field: str) -> Iterator[Document]:
    try:
        table = parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield _document(row, field, f"{file}: row {number}")
    except OSError as error:  # pyarrow's own errors are among them
        raise UserError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


def _of_table(file: Path, field: str) -> Iterator[Document]:
    """Read what no library streams: a CSV or a JSON list, checked and read as rows are."""
    problems = broken_lines(file)
    if problems:
        raise UserError(*problems[:10])
    for number, line in enumerate(json_rows(file), start=1):
        yield _document(parse_json(line), field, f"{file}: row {number}")


def _document(row: Any, field: str, where: str) -> Document:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    if not isinstance(row.get(field), str):
        have = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"{where}: no text in '{field}' (fields: {have}); set data.field (train-tokenizer: --field)"
        )
    others = {name: value for name, value in row.items() if name != field}
    return Document(row[field], where, others)
