"""Where raw rows come from: local files, a saved ``datasets`` folder, or the hub; read into ``datasets.Dataset``."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from fine_tune.data.files import KINDS, lines_of, read_files
from fine_tune.data.formats import FormatName
from fine_tune.data.templates import Templates
from fine_tune.errors import UserError

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
        chosen: Template of the better answer of a pair.
        rejected: Template of the worse one.
        revision: Revision of a hub data set.
    """

    path: str | dict[str, str]
    format: FormatName | Literal["preference"] | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    revision: str | None = None

    @property
    def templates(self) -> Templates:
        return Templates(self.format, self.prompt, self.completion, self.chosen, self.rejected)

    @property
    def label(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path.values())


def fingerprint(source: Source) -> str:
    """Identify the content of a source: SHA-256 over its files, or hub name and commit."""
    digest = hashlib.sha256()
    for split, path in _paths(source):
        digest.update(split.encode())
        if not _exists(path):
            digest.update(f"{path}@{_hub_commit(path, source.revision)}".encode())
            continue
        for file in [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*")):
            if not _exists(str(file)) and file.suffix in KINDS:
                raise UserError(f"data.path: {file}: a link that leads nowhere; remove or mend it")
            if not file.is_file():
                continue
            digest.update(
                str(file.relative_to(path)).encode() if file != Path(path) else file.suffix.encode()
            )
            try:
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise UserError(f"data.path: {file} cannot be read: {error.strerror}") from error
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


def path_of(source: Source, split: str) -> str:
    """Return the path or hub name that a split of a source comes from."""
    paths = dict(_paths(source))
    return paths.get(split) or paths[ALL]


def locate_row(source: Source, split: str, index: int) -> str:
    """Say where row ``index`` of a split stands, as ``file:line`` where the format has lines."""
    paths = dict(_paths(source))
    path = Path(paths.get(split) or paths.get(ALL, ""))
    if not path.exists():  # on the hub
        return f"{source.label}: row {index + 1}"
    files = _files_of(path).get(split) or _files_of(path).get(ALL) or []
    for file in files:
        if file.suffix not in (".jsonl", ".txt"):
            return f"{source.label}: row {index + 1}"
        for number, _ in lines_of(file):
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
    splits = [SPLIT_NAMES[name] for name in source.path]
    if len(set(splits)) < len(splits):
        raise UserError(
            f"data.path: {', '.join(source.path)}: two names of one split; give each once"
        )
    return [(SPLIT_NAMES[name], path) for name, path in source.path.items()]


def _read(path: str, revision: str | None, cache_dir: Path) -> dict[str, Dataset]:
    local = Path(path)
    if not _exists(path):
        return _read_hub(path, revision, cache_dir)
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        try:
            saved = load_from_disk(path)
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: '{path}' cannot be read: {error}") from error
        return _named(saved) if isinstance(saved, DatasetDict) else {ALL: saved}
    return {split: read_files(files, cache_dir) for split, files in _files_of(local).items()}


def _read_hub(name: str, revision: str | None, cache_dir: Path) -> dict[str, Dataset]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in KINDS:
        raise UserError(
            f"data.path: '{name}' does not exist; give a file, a folder or a hub name like 'owner/name'"
        )
    _hub_commit(name, revision)
    try:
        found = _named(load_dataset(name, revision=revision, cache_dir=str(cache_dir)))
    except Exception as error:
        raise UserError(
            f"data.path: hub data set '{name}': {str(error).splitlines()[0]}"
        ) from error
    # Rows that were never split are all "train" on the hub.
    return {ALL: found["train"]} if list(found) == ["train"] else found


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
    files = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
    if not files:
        raise UserError(
            f"data.path: folder '{path}' holds no data; known kinds: {', '.join(KINDS)}"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.fullmatch(r"([a-z]+)(-\d.*)?", file.stem)
        if match and match[1] in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[match[1]], []).append(file)
    if "train" not in splits:
        return {ALL: files}
    kinds = {".json"} - {file.suffix for file in splits["train"]}  # descriptions beside the data
    placed = {file for of_split in splits.values() for file in of_split}
    others = [str(f) for f in files if f not in placed and f.suffix not in kinds]
    if others:
        raise UserError(
            f"data.path: folder '{path}' has files of splits, and {', '.join(others[:3])}, which would not be read; "
            "move it, or name the files: {train: ..., validation: ..., test: ...}"
        )
    return splits


def _exists(path: str) -> bool:
    if not path.strip():
        raise UserError(
            "data.path: is empty; give a file, a folder or a hub name like 'owner/name'"
        )
    try:
        path.encode()
        found = Path(path).exists()
    except OSError as error:
        raise UserError(f"data.path: '{path[:60]}' cannot be read: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"data.path: {path!r}: the name is not UTF-8; rename it") from error
    if found and Path(path).resolve() == Path("/"):
        raise UserError(f"data.path: '{path}' is the whole file system; give a file or a folder")
    return found
