"""Files of rows -> a table that keeps every value as it was written."""

import codecs
import csv
import glob
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from fine_tune.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
JSON_ROW = "__fine_tune_json_row__"  # the one column of sources that were text files
MOST_DIGITS = 4_300  # Python reads no longer numbers


def read_files(files: list[Path], cache_dir: Path) -> Dataset:
    """Read files of one kind into one table.

    Args:
        files: What to read, in order.
        cache_dir: Folder for the library's Arrow files.

    Raises:
        UserError: Files of two kinds, empty or broken ones (file and line).
    """
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(KINDS):
        shown = ", ".join(str(file) for file in files[:3])
        raise UserError(f"data.path: {shown}: give files of one kind; known: {', '.join(KINDS)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
    if kinds == {".parquet"}:
        try:
            paths = [glob.escape(str(file)) for file in files]
            rows = load_dataset(
                "parquet", data_files=paths, cache_dir=str(cache_dir), split="train"
            )
            rows.data.table.validate(full=True)  # texts that are not UTF-8
            return rows
        except Exception as error:
            told = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{files[0]}: cannot be read: {told}") from error
    problems = [problem for file in files for problem in broken_lines(file)][:10]
    if problems:
        raise UserError(*problems)
    texts = [str(file) for file in files]
    if next(_json_rows(texts), None) is None:
        raise UserError(f"{files[0]}: no rows; the data is empty")
    return Dataset.from_generator(_json_rows, gen_kwargs={"files": texts}, cache_dir=str(cache_dir))


def _json_rows(files: list[str]) -> Iterator[dict[str, str]]:
    """Give every row as a line of JSON: no library gets to guess types, so 007 stays 007 and a date stays text."""
    for name in files:
        yield from ({JSON_ROW: row} for row in json_rows(Path(name)))


def json_rows(file: Path) -> Iterator[str]:
    """Give every row of a file that was checked, as a line of JSON."""
    if file.suffix == ".jsonl":
        yield from (line.decode().strip() for _, line in lines_of(file))
    elif file.suffix == ".txt":
        yield from (
            json.dumps({"text": line.decode().rstrip("\r\n")}) for _, line in lines_of(file)
        )
    elif file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as handle:
            yield from (json.dumps(row) for row in csv.DictReader(handle, strict=True))
    else:
        yield from _elements(file.read_text("utf-8-sig"))


def _elements(text: str) -> Iterator[str]:
    """Give the elements of a JSON list as they are written there."""
    blank, decode = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
    position = text.index("[") + 1
    while True:
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        if text[position] == "]":
            return
        _, end = decode(text, position)
        yield text[position:end]
        position = end


class ExactFloat(float):
    """A number that is written as it stood in the data: 1.50 stays 1.50."""

    def __new__(cls, text: str) -> "ExactFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a batch of a source's table into rows."""
    if JSON_ROW in batch:
        exact: Any = {"parse_float": ExactFloat, "parse_int": _int}
        return [json.loads(line, **exact) for line in batch[JSON_ROW]]
    names = list(batch)
    return [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def fields_of(rows: Dataset) -> list[str]:
    """Name the fields of a source's rows, told by its table or its first rows."""
    if JSON_ROW not in rows.column_names:
        return list(rows.column_names)
    first = rows_of(rows[: min(100, len(rows))])
    return list(dict.fromkeys(name for row in first for name in row))


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines that are not blank, with their numbers, a byte order mark left out."""
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def broken_lines(file: Path) -> list[str]:
    """Say what of a file of rows cannot be read, with its lines where the format has them."""
    if file.suffix in (".jsonl", ".txt"):
        return [
            problem
            for number, line in lines_of(file)
            if (problem := _broken_line(file, number, line))
        ]
    try:
        text = file.read_text("utf-8-sig")
        rows = parse_json(text) if file.suffix == ".json" else _csv_rows(text)
    except UnicodeDecodeError as error:
        return [
            f"{file}: not UTF-8 (byte {error.object[error.start]:#x} at {error.start}); convert it"
        ]
    except json.JSONDecodeError as error:
        return [f"{file}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}"]
    except csv.Error as error:
        return [f"{file}: broken CSV: {error}"]
    except ValueError as error:
        return [f"{file}: {error}"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return [f"{file}: a list of JSON objects is wanted"]
    header = [name for name in rows[0] if name is not None] if rows else []
    return [
        f"{file}: row {number}: other fields than the header's {header}"
        for number, row in enumerate(rows, start=1)
        if file.suffix == ".csv" and (None in row or None in row.values())
    ]


def _broken_line(file: Path, number: int, line: bytes) -> str | None:
    try:
        text = line.decode("utf-8")
        if file.suffix == ".jsonl" and not isinstance(parse_json(text), dict):
            return f"{file}:{number}: not a JSON object: {text.strip()[:60]}"
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#x} at {error.start}"
        return f"{file}:{number}: not UTF-8 ({where}); convert it"
    except json.JSONDecodeError as error:
        shown = line.decode("utf-8", "replace").strip()[:60]
        return f"{file}:{number}: broken JSON: {error.msg} at column {error.colno}: {shown}"
    except ValueError as error:
        return f"{file}:{number}: {error}"
    return None


def parse_json(text: str) -> Any:
    """Read JSON to the letter: every field once, no NaN, and only text that can be written again.

    Raises:
        ValueError: What is wrong; ``json.JSONDecodeError`` with its place where it is no JSON at all.
    """
    try:
        value = json.loads(
            text, parse_int=_int, parse_constant=_no_constant, object_pairs_hook=_fields_once
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"half a character ({half[:6]}), which no text can hold") from error
    return value


def _int(text: str) -> int | float:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits; write it as text")
    return ExactFloat(text) if text == "-0" else int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"broken JSON: {name} is no JSON value; write null, or a text")


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{twice}' stands twice in one object")
    return row


def _csv_rows(text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = list(reader.fieldnames or [])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{twice}' stands twice in the header")
    if len(names) == 1 and (other := next((mark for mark in ";\t" if mark in names[0]), None)):
        kind = "semicolons" if other == ";" else "tabs"
        raise ValueError(f"{kind} stand between the fields of the header; write commas there")
    return list(reader)
