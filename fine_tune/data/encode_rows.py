"""Parts of raw rows -> tables of encoded rows, in one pass over each."""

import hashlib
import os
import sys
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from fine_tune.data.encode import Encoder
from fine_tune.data.files import rows_of
from fine_tune.data.formats import FORMATS
from fine_tune.data.parts import MAX_ROW_ERRORS, Part
from fine_tune.data.preferences import encode_pairs, pair_segments, preference
from fine_tune.data.sources import locate_row
from fine_tune.data.templates import PREFERENCE, RowError
from fine_tune.errors import UserError
from fine_tune.losses import num_supervised_targets

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
        "num_prompt": Value("int32"),  # of a pair, else 0
        "num_chosen": Value("int32"),
        "num_answers_cut": Value("int32"),
        "margin": Value("float64"),
    }
)


def encode_part(part: Part, encoder: Encoder) -> Dataset:
    """Encode the rows of a part; those that the truncation policy leaves out have no tokens.

    Raises:
        UserError: Rows that cannot be encoded, each with its place.
    """
    source, format_name = part.source, part.format_name
    pairs = format_name == PREFERENCE
    chat = format_name in ("messages", "sharegpt")
    if pairs and len(part.rows):
        chat = isinstance(part.rows[0].get("chosen"), list) and source.chosen is None
    errors: list[str] = []

    def where(index: int) -> str:
        return locate_row(source, part.found_in, int(part.positions[index]))

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        segments, kept, margins = [], [], []
        for index, row in zip(indices, rows_of(batch), strict=True):
            try:
                guarded = encoder.guard(row)
                if pairs:
                    pair = preference(guarded, source.templates)
                    segments.append(pair_segments(encoder, pair))
                    margins.append(pair["margin"])
                else:
                    example = FORMATS[format_name](guarded, source.templates)
                    segments.append([encoder.segments(example)])
                    margins.append(0.0)
                kept.append(index)
            except RowError as error:
                errors.append(f"{where(index)}: {error}")
                if len(errors) >= MAX_ROW_ERRORS:
                    raise UserError(*errors) from error
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        rows = (
            encode_pairs(encoder, segments, chat=chat)
            if pairs
            else encoder.encode([only for (only,) in segments], chat=chat)
        )
        for row_segments, index, encoded, margin in zip(segments, kept, rows, margins, strict=True):
            num_supervised = num_supervised_targets(encoded.labels) if encoded else 0
            if encoded is not None and num_supervised == 0:
                shown = "".join(s.text for s in row_segments[0])[:300]
                why = (
                    encoded.problem
                    or "no token of this row carries loss, the prompt alone fills it"
                )
                raise UserError(
                    f"{where(index)}: within data.max_length {encoder.max_length} {why}; raise it, or set "
                    f"data.truncation: prompt_left or drop. The row begins:\n{shown}"
                )
            columns["input_ids"].append(encoded.input_ids if encoded else [])
            columns["labels"].append(encoded.labels if encoded else [])
            columns["row_id"].append(part.first_id + int(part.positions[index]))
            columns["weight"].append(source.weight)
            columns["num_supervised"].append(num_supervised)
            columns["num_cut"].append(encoded.num_cut if encoded else 0)
            columns["num_supervised_cut"].append(encoded.num_supervised_cut if encoded else 0)
            columns["num_prompt"].append(encoded.num_prompt if encoded else 0)
            columns["num_chosen"].append(encoded.num_chosen if encoded else 0)
            columns["num_answers_cut"].append(encoded.num_answers_cut if encoded else 0)
            columns["margin"].append(margin)
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


def column(rows: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers."""
    return np.asarray(rows.with_format("numpy")[name][:])


def token_counts(rows: Dataset) -> np.ndarray:
    """Return the number of tokens of each row."""
    return np.asarray(pc.list_value_length(rows.with_format("arrow")["input_ids"][:]))


def sequence_lengths(rows: Dataset) -> np.ndarray:
    """Return the positions each row needs in a model: its tokens; of a pair, the prompt's and its longer answer's."""
    tokens = token_counts(rows)
    num_prompt, num_chosen = column(rows, "num_prompt"), column(rows, "num_chosen")
    of_pair = np.maximum(num_prompt + num_chosen, tokens - num_chosen)
    return np.where(num_chosen > 0, of_pair, tokens)
