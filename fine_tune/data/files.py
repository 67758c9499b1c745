"""Files of rows -> a table that keeps every value as it was written."""

import codecs
import csv
import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from fine_tune.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
JSON_ROW = "json_row"  # the one column of sources that were text files


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
            return load_dataset(
                "parquet", data_files=paths, cache_dir=str(cache_dir), split="train"
            )
        except Exception as error:
            told = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{files[0]}: cannot be read: {told}") from error
    problems = [problem for file in files for problem in _broken_lines(file)][:10]
    if problems:
        raise UserError(*problems)
    texts = [str(file) for file in files]
    return Dataset.from_generator(_json_rows, gen_kwargs={"files": texts}, cache_dir=str(cache_dir))


def _json_rows(files: list[str]) -> Iterator[dict[str, str]]:
    """Give every row as a line of JSON: no library gets to guess types, so 007 stays 007 and a date stays text."""
    for name in files:
        file = Path(name)
        if file.suffix == ".jsonl":
            yield from ({JSON_ROW: line.decode().strip()} for _, line in lines_of(file))
        elif file.suffix == ".txt":
            yield from (
                {JSON_ROW: json.dumps({"text": line.decode().rstrip("\r\n")})}
                for _, line in lines_of(file)
            )
        elif file.suffix == ".csv":
            with open(file, encoding="utf-8-sig", newline="") as handle:
                yield from (
                    {JSON_ROW: json.dumps(row)} for row in csv.DictReader(handle, strict=True)
                )
        else:
            yield from (
                {JSON_ROW: json.dumps(row)} for row in json.loads(file.read_text("utf-8-sig"))
            )


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
        return [json.loads(line, parse_float=ExactFloat) for line in batch[JSON_ROW]]
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


def _broken_lines(file: Path) -> list[str]:
    if file.suffix in (".jsonl", ".txt"):
        return [
            problem
            for number, line in lines_of(file)
            if (problem := _broken_line(file, number, line))
        ]
    try:
        text = file.read_text("utf-8-sig")
        rows = json.loads(text) if file.suffix == ".json" else _csv_rows(text)
    except UnicodeDecodeError as error:
        return [
            f"{file}: not UTF-8 (byte {error.object[error.start]:#x} at {error.start}); convert it"
        ]
    except json.JSONDecodeError as error:
        return [f"{file}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}"]
    except csv.Error as error:
        return [f"{file}: broken CSV: {error}"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return [f"{file}: a list of JSON objects is wanted"]
    return [
        f"{file}: row {number}: other fields than the header's {list(rows[0])}"
        for number, row in enumerate(rows, start=1)
        if file.suffix == ".csv" and (None in row or None in row.values())
    ]


def _broken_line(file: Path, number: int, line: bytes) -> str | None:
    try:
        text = line.decode("utf-8")
        if file.suffix == ".jsonl" and not isinstance(json.loads(text), dict):
            return f"{file}:{number}: not a JSON object: {text.strip()[:60]}"
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#x} at {error.start}"
        return f"{file}:{number}: not UTF-8 ({where}); convert it"
    except json.JSONDecodeError as error:
        shown = line.decode("utf-8", "replace").strip()[:60]
        return f"{file}:{number}: broken JSON: {error.msg} at column {error.colno}: {shown}"
    return None


def _csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
