"""What the training rows are made of, and where each came from: for resuming a run and for explaining a step."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fine_tune.data.sources import Source, fingerprint, locate_row, path_of, read_source
from fine_tune.losses import IGNORE_INDEX

ROWS_AT_ONCE = 10_000


def data_content(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> dict[str, Any]:
    """Identify the data by what is in it, never by where it lies.

    Args:
        sources: Where rows come from.
        tokenizer: What made tokens of them.
        rows: The encoded training rows.

    Returns:
        ``data.files`` (each file with its SHA-256), format, weight and templates of each source, the tokenizer, and
        ``data.training_rows``: a hash of every training row's tokens, labels, id, weight and margin, in order.
    """
    content: dict[str, Any] = {
        "data.files": [file for source in sources for file in _files(source)],
        **_of_tokenizer(tokenizer),
        "data.training_rows": rows_digest(rows),
    }
    for i, source in enumerate(sources):
        prefix = "data" if len(sources) == 1 else f"data.sources.{i}"
        for name in ("format", "weight", "prompt", "completion", "chosen", "rejected"):
            content[f"{prefix}.{name}"] = getattr(source, name)
    return content


def rows_digest(rows: Dataset) -> str:
    """Hash encoded rows: their tokens, which of them carry loss, their ids, weights and margins, in order."""
    digest = hashlib.sha256()
    arrow = rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        table = arrow[start : start + ROWS_AT_ONCE]
        digest.update(pc.list_value_length(table["input_ids"]).to_numpy().tobytes())
        digest.update(pc.list_flatten(table["input_ids"]).to_numpy().tobytes())
        if "pieces" in table.column_names:
            digest.update(pc.list_flatten(table["pieces"]).to_numpy().tobytes())
        else:
            labels = pc.list_flatten(table["labels"]).to_numpy()
            digest.update(np.packbits(labels != IGNORE_INDEX).tobytes())
        for name in ("row_id", "weight"):
            digest.update(table[name].to_numpy().tobytes())
        margins = table["margin"].to_numpy()
        if margins.any():
            digest.update(margins.tobytes())
    return digest.hexdigest()


def locate_rows(sources: list[Source], row_ids: list[int]) -> list[str]:
    """Say where rows stand in their sources, as ``file:line`` where the format has lines.

    Args:
        sources: The sources in the order they were read.
        row_ids: Ids as batches carry them: rows are numbered through all sources and their splits.
    """
    places = {}
    with TemporaryDirectory(prefix="fine_tune-") as scratch:
        first_id = 0
        for source in sources:
            for split, table in read_source(source, Path(scratch)).items():
                for row_id in row_ids:
                    if first_id <= row_id < first_id + len(table):
                        places[row_id] = locate_row(source, split, row_id - first_id)
                first_id += len(table)
    return [places.get(row_id, "in none of the sources") for row_id in row_ids]


def _files(source: Source) -> Iterator[dict[str, str]]:
    paths = {"all": source.path} if isinstance(source.path, str) else source.path
    for split, path in paths.items():
        if Path(path).exists():
            local = Path(path)
            inside = sorted(p for p in local.rglob("*") if p.is_file())
            for file in [local] if local.is_file() else inside:
                yield {"file": str(file), "split": split, "content": _sha256(file)}
        else:
            hub = Source(path, revision=source.revision)
            yield {"file": path_of(hub, "train"), "split": split, "content": fingerprint(hub)}


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    state = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    return {
        "model.tokenizer": hashlib.sha256(state.encode()).hexdigest(),
        "model.tokenizer.special_tokens": str(tokenizer.special_tokens_map),
        "model.tokenizer.chat_template": tokenizer.chat_template,
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
