"""Where raw rows come from: local files, a saved ``datasets`` folder, or the hub; read into ``datasets.Dataset``."""

import csv
import glob
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from fine_tune.data.formats import FormatName, Templates
from fine_tune.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
JSON_ROW = "json_row"  # the one column of sources that were text files
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
SPLIT_NAMES |= {"dev": "validation", "eval": "validation", "test": "test"}
ALL = "all"


@dataclass
class Source:
    """One place rows come from.

    Args:
        path: A file (.jsonl, .json, .csv, .parquet, .txt), a folder of them, a folder written by
            ``save_to_disk``, a hub name, or one of these per split: ``{train: a.jsonl, validation: b.jsonl}``.
        format: How to read a row; None detects it from the templates and fields.
        weight: How often each row is seen per epoch (0.5: half of the rows, drawn anew each epoch).
        prompt: Template of the prompt over the row's fields, like ``"Question: {question}"``.
        completion: Template of the completion, like ``" {answer}"``.
        revision: Revision of a hub data set.
    """

    path: str | dict[str, str]
    format: FormatName | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None
    revision: str | None = None

    @property
    def templates(self) -> Templates:
        return Templates(self.format, self.prompt, self.completion)

    @property
    def label(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path.values())


def fingerprint(source: Source) -> str:
    """Identify the content of a source: SHA-256 over its files, or hub name and commit."""
    digest = hashlib.sha256()
    for split, path in _paths(source):
        digest.update(split.encode())
        if not Path(path).exists():
            digest.update(f"{path}@{_hub_commit(path, source.revision)}".encode())
            continue
        for file in (
            [Path(path)]
            if Path(path).is_file()
            else sorted(p for p in Path(path).rglob("*") if p.is_file())
        ):
            digest.update(
                str(file.relative_to(path)).encode() if file != Path(path) else file.suffix.encode()
            )
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_source(source: Source, cache_dir: Path) -> dict[str, Dataset]:
    """Read the rows of a source.

    Args:
        source: Where and what.
        cache_dir: Folder for the library's Arrow files.

    Returns:
        Rows per split where the source has splits, else all of them under ``"all"``.

    Raises:
        UserError: Missing, empty, broken (file and line) or unreadable data.
    """
    found: dict[str, Dataset] = {}
    for split, path in _paths(source):
        parts = _read(path, source.revision, cache_dir)
        if split != ALL:
            if set(parts) not in ({ALL}, {split}):
                raise UserError(
                    f"data.path.{split}: '{path}' has splits of its own ({', '.join(parts)}); name one file"
                )
            parts = {split: next(iter(parts.values()))}
        found |= parts
    for split, rows in found.items():
        if len(rows) == 0:
            raise UserError(
                f"{source.label}: no rows{'' if split == ALL else f' in split {split}'}; the data is empty"
            )
    return found


def locate_row(source: Source, split: str, index: int) -> str:
    """Say where row ``index`` of a split stands, as ``file:line`` where the format has lines."""
    paths = dict(_paths(source))
    path = Path(paths.get(split) or paths.get(ALL, ""))
    files = _files_of(path).get(split) or _files_of(path).get(ALL) or []
    for file in files:
        if file.suffix not in (".jsonl", ".txt"):
            return f"{source.label}: row {index + 1}"
        for number, _ in _lines(file):
            if index == 0:
                return f"{file}:{number}"
            index -= 1
    return f"{source.label}: row {index + 1}"


def _paths(source: Source) -> list[tuple[str, str]]:
    if isinstance(source.path, str):
        return [(ALL, source.path)]
    wrong = [name for name in source.path if name not in SPLIT_NAMES]
    if wrong:
        raise UserError(f"data.path: unknown split {wrong}; allowed: train, validation, test")
    return [(SPLIT_NAMES[name], path) for name, path in source.path.items()]


def _read(path: str, revision: str | None, cache_dir: Path) -> dict[str, Dataset]:
    local = Path(path)
    if not path.strip():
        raise UserError(
            "data.path: is empty; give a file, a folder or a hub name like 'owner/name'"
        )
    if not local.exists():
        return _read_hub(path, revision, cache_dir)
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        try:
            saved = load_from_disk(path)
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: '{path}' cannot be read: {error}") from error
        return _named(saved) if isinstance(saved, DatasetDict) else {ALL: saved}
    return {split: _read_files(files, cache_dir) for split, files in _files_of(local).items()}


def _read_files(files: list[Path], cache_dir: Path) -> Dataset:
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
            yield from ({JSON_ROW: line.decode().strip()} for _, line in _lines(file))
        elif file.suffix == ".txt":
            yield from (
                {JSON_ROW: json.dumps({"text": line.decode().rstrip("\r\n")})}
                for _, line in _lines(file)
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


def _read_hub(name: str, revision: str | None, cache_dir: Path) -> dict[str, Dataset]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in KINDS:
        raise UserError(
            f"data.path: '{name}' does not exist; give a file, a folder or a hub name like 'owner/name'"
        )
    _hub_commit(name, revision)
    try:
        return _named(load_dataset(name, revision=revision, cache_dir=str(cache_dir)))
    except Exception as error:
        raise UserError(
            f"data.path: hub data set '{name}': {str(error).splitlines()[0]}"
        ) from error


def _hub_commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return f"offline:{revision}"
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=5).sha)
    except Exception as error:
        raise UserError(
            f"data.path: '{name}' is neither a file or folder here nor to be had from the hub "
            f"({type(error).__name__}); check the name and the connection"
        ) from error


def _named(splits: DatasetDict) -> dict[str, Dataset]:
    named = {SPLIT_NAMES[name]: rows for name, rows in splits.items() if name in SPLIT_NAMES}
    return named or {ALL: next(iter(splits.values()))}


def _files_of(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {ALL: [path]}
    files = sorted(p for p in path.rglob("*") if p.suffix in KINDS) if path.is_dir() else []
    if not files:
        raise UserError(
            f"data.path: folder '{path}' holds no data; known kinds: {', '.join(KINDS)}"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.fullmatch(r"([a-z]+)(-\d.*)?", file.stem)
        if match and match[1] in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[match[1]], []).append(file)
    return splits if "train" in splits else {ALL: files}


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with open(file, "rb") as handle:
        yield from ((number, line) for number, line in enumerate(handle, start=1) if line.strip())


def _broken_lines(file: Path) -> list[str]:
    if file.suffix in (".jsonl", ".txt"):
        return [
            problem
            for number, line in _lines(file)
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
