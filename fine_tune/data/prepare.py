"""Raw sources -> encoded rows per split, once: cached by data + templates + tokenizer + options."""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_from_disk
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fine_tune.data.encode import AssistantTurns, Encoder, Truncation
from fine_tune.data.files import rows_of
from fine_tune.data.formats import FORMATS, RowError
from fine_tune.data.parts import MAX_ROW_ERRORS, Part, format_of, shared_prompts, split_sources
from fine_tune.data.sources import Source, fingerprint, locate_row, read_source
from fine_tune.data.split import SPLITS
from fine_tune.errors import UserError
from fine_tune.losses import num_supervised_targets

log = logging.getLogger("fine_tune")
ENCODING_VERSION = (
    1  # part of the cache key: raise it when the same input gives other tokens or other splits
)
_INT_LIST = datasets.List(Value("int32"))
FEATURES = Features(
    {
        "input_ids": _INT_LIST,
        "labels": _INT_LIST,
        "row_id": Value("int64"),
        "weight": Value("float64"),
        "num_supervised": Value("int32"),
        "num_cut": Value("int32"),
        "num_supervised_cut": Value("int32"),
    }
)


@dataclass(frozen=True)
class Options:
    """All that decides which tokens a row gets and where it goes, beside the data and the tokenizer."""

    max_length: int
    truncation: Truncation
    assistant_turns: AssistantTurns
    split: str | dict[str, float] | None
    max_rows: dict[str, int]


@dataclass
class PreparedData:
    """Encoded rows per split, and one line per thing the user should know of them."""

    rows: dict[str, Dataset]
    notes: list[str]
    folder: Path


def prepare(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, options: Options, cache_dir: Path
) -> PreparedData:
    """Read, split and encode all sources, or open what an earlier run left in the cache.

    Args:
        sources: Where rows come from.
        tokenizer: The model's tokenizer.
        options: What decides tokens and splits.
        cache_dir: Folder that holds the cache; another process preparing the same data is waited for.

    Raises:
        UserError: Everything wrong with the data that can be told at once.
    """
    datasets.disable_progress_bars()
    key = _cache_key(sources, tokenizer, options)
    folder = cache_dir / "tokens" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: '{folder.parent}' cannot be made: {error.strerror}"
        ) from error
    with FileLock(f"{folder}.lock"):
        cached = folder.is_dir()
        if not cached:
            _prepare(sources, tokenizer, options, cache_dir, folder)
    rows = {
        split: load_from_disk(str(folder / split)) for split in SPLITS if (folder / split).is_dir()
    }
    notes = json.loads((folder / "notes.json").read_text())
    return PreparedData(rows, [*notes, *(["tokens from the cache"] if cached else [])], folder)


def _prepare(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    cache_dir: Path,
    folder: Path,
) -> None:
    encoder = Encoder(
        tokenizer,
        max_length=options.max_length,
        truncation=options.truncation,
        assistant_turns=options.assistant_turns,
    )
    with TemporaryDirectory(dir=cache_dir, prefix=".reading-") as scratch:  # no cache but ours
        found = [(source, read_source(source, Path(scratch))) for source in sources]
        parts = split_sources(found, options.split, options.max_rows)
        if not any(part.split == "train" for part in parts):
            raise UserError(f"data.path: no train split, only {', '.join(p.split for p in parts)}")
        names = [split for split in SPLITS if any(part.split == split for part in parts)]
        _refuse_empty({s: sum(len(part.rows) for part in parts if part.split == s) for s in names})
        encoded = {
            split: concatenate_datasets(
                [_encode_part(p, encoder) for p in parts if p.split == split]
            )
            for split in names
        }
        _finish(encoded, shared_prompts(parts), options, folder)


def _finish(encoded: dict[str, Dataset], notes: list[str], options: Options, folder: Path) -> None:
    notes = notes + [
        note for split, rows in encoded.items() for note in _notes(split, rows, options)
    ]
    encoded = {
        split: rows.select(np.flatnonzero(rows.with_format("numpy")["num_supervised"][:]))
        for split, rows in encoded.items()
    }
    _refuse_empty({split: len(rows) for split, rows in encoded.items()})
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    for split, rows in encoded.items():
        rows.save_to_disk(str(unfinished / split))
    (unfinished / "notes.json").write_text(json.dumps(notes))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _refuse_empty(num_rows: dict[str, int]) -> None:
    empty = [split for split, count in num_rows.items() if count == 0]
    if empty:
        sizes = ", ".join(f"{split} {count}" for split, count in num_rows.items())
        raise UserError(
            f"data.split: no rows are left for {', '.join(empty)} ({sizes}); "
            "give more rows, other ratios, row counts like {validation: 20, test: 20}, or none"
        )


def _encode_part(part: Part, encoder: Encoder) -> Dataset:
    source = part.source
    format_name = format_of(part.rows, source)
    chat = format_name in ("messages", "sharegpt")
    errors: list[str] = []

    def where(index: int) -> str:
        return locate_row(source, part.found_in, int(part.positions[index]))

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        segments, kept = [], []
        for index, row in zip(indices, rows_of(batch), strict=True):
            try:
                segments.append(
                    encoder.segments(FORMATS[format_name](encoder.guard(row), source.templates))
                )
                kept.append(index)
            except RowError as error:
                errors.append(f"{where(index)}: {error}")
                if len(errors) >= MAX_ROW_ERRORS:
                    raise UserError(*errors) from error
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for row_segments, index, encoded in zip(
            segments, kept, encoder.encode(segments, chat=chat), strict=True
        ):
            num_supervised = num_supervised_targets(encoded.labels) if encoded else 0
            if encoded is not None and num_supervised == 0:
                shown = "".join(s.text for s in row_segments)[:300]
                raise UserError(
                    f"{where(index)}: no token of this row carries loss within "
                    f"data.max_length {encoder.max_length}, the prompt alone fills it; raise it, or set "
                    f"data.truncation: prompt_left or drop. The row begins:\n{shown}"
                )
            columns["input_ids"].append(encoded.input_ids if encoded else [])
            columns["labels"].append(encoded.labels if encoded else [])
            columns["row_id"].append(part.first_id + int(part.positions[index]))
            columns["weight"].append(source.weight)
            columns["num_supervised"].append(num_supervised)
            columns["num_cut"].append(encoded.num_cut if encoded else 0)
            columns["num_supervised_cut"].append(encoded.num_supervised_cut if encoded else 0)
        return columns

    show_progress = sys.stderr.isatty() and len(part.rows) > 2000
    (datasets.enable_progress_bars if show_progress else datasets.disable_progress_bars)()
    encoded = part.rows.map(
        encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=part.rows.column_names,
        features=FEATURES,
        desc=f"Tokenizing {part.split}",
        load_from_cache_file=False,
        keep_in_memory=False,
        new_fingerprint=hashlib.sha256(os.urandom(16)).hexdigest()[:16],
    )
    datasets.disable_progress_bars()
    if errors:
        raise UserError(*errors)
    return encoded


def _notes(split: str, rows: Dataset, options: Options) -> list[str]:
    columns = rows.with_format("numpy")
    cut, lost, supervised = (
        columns[name][:] for name in ("num_cut", "num_supervised_cut", "num_supervised")
    )
    notes = Counter(
        {
            f"{split}: {{}} rows truncated to {options.max_length} tokens ({options.truncation})": int(
                (cut > 0).sum()
            ),
            f"{split}: {{}} supervised tokens lost to truncation": int(lost.sum()),
            f"{split}: {{}} rows left out, longer than {options.max_length} tokens ({options.truncation})": int(
                (supervised == 0).sum()
            ),
        }
    )
    return [text.format(f"{count:,}") for text, count in notes.items() if count]


def _cache_key(sources: list[Source], tokenizer: PreTrainedTokenizerBase, options: Options) -> str:
    tokenizer_state = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    parts = [
        ENCODING_VERSION,
        [{**asdict(source), "content": fingerprint(source)} for source in sources],
        hashlib.sha256(tokenizer_state.encode()).hexdigest(),
        tokenizer.chat_template,
        str(tokenizer.special_tokens_map),
        asdict(options),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
