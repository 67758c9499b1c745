"""Which rows of which source go to which split, before anything is tokenized."""

import json
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from fine_tune.data.files import fields_of, rows_of
from fine_tune.data.formats import (
    FORMATS,
    Example,
    FormatName,
    RowError,
    check_templates,
    detect_format,
)
from fine_tune.data.sources import ALL, Source, locate_row
from fine_tune.data.split import DEFAULT_RATIOS, SPLITS, assign_splits, group_hash
from fine_tune.errors import UserError

MAX_ROW_ERRORS = 10
Split = str | dict[str, float] | None


@dataclass(frozen=True)
class Part:
    """Rows of one source that go to one split.

    ``positions`` are their places in the split ``found_in`` of the source; ``first_id`` is that split's first row id.
    """

    source: Source
    split: str
    found_in: str
    rows: Dataset
    positions: np.ndarray
    first_id: int
    hashes: np.ndarray


def split_sources(
    found: list[tuple[Source, dict[str, Dataset]]], split: Split, max_rows: dict[str, int]
) -> list[Part]:
    """Split the rows of all sources together, so that no prompt stands on two sides.

    Args:
        found: Each source with its rows, under ``"all"`` or its own splits.
        split: Ratios, row counts, ``existing``, ``none``, or None: existing splits where there are, else ratios.
        max_rows: At most so many rows of a source per split, the first ones.

    Raises:
        UserError: The data does not have what ``split`` asks for, or a row cannot be read.
    """
    for source, tables in found:
        _check_found(source, tables, split)
    listed = [(s, name, rows) for s, parts in found for name, rows in parts.items()]
    hashes = [_group_hashes(rows, source, name) for source, name, rows in listed]
    sizes = split if isinstance(split, dict) else DEFAULT_RATIOS
    to_split = [name == ALL and split != "none" for _, name, _ in listed]
    pooled = [h for h, wanted in zip(hashes, to_split, strict=True) if wanted]
    sides = assign_splits(np.concatenate(pooled), sizes) if pooled else np.empty(0, dtype=np.int8)
    wanted_splits = [s for s in SPLITS if s == "train" or sizes.get(s, 0) > 0]
    parts, first_id, start = [], 0, 0
    for (source, name, rows), row_hashes, hashed in zip(listed, hashes, to_split, strict=True):
        if hashed:
            mine = sides[start : start + len(rows)]
            start += len(rows)
            places = {s: np.flatnonzero(mine == SPLITS.index(s)) for s in wanted_splits}
        else:
            places = {"train" if split == "none" else name: np.arange(len(rows))}
        for split_name, positions in places.items():
            kept = positions[: max_rows.get(split_name, len(positions))]
            parts.append(
                Part(source, split_name, name, rows.select(kept), kept, first_id, row_hashes[kept])
            )
        first_id += len(rows)
    return parts


def shared_prompts(parts: list[Part]) -> list[str]:
    """Say which splits share prompts: possible where the data came with splits of its own."""
    by_split = {
        s: np.unique(np.concatenate([p.hashes for p in parts if p.split == s]))
        for s in SPLITS
        if any(p.split == s for p in parts)
    }
    notes = []
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1 :]:
            if first in by_split and second in by_split:
                shared = len(np.intersect1d(by_split[first], by_split[second]))
                if shared:
                    notes.append(
                        f"WARNING: {shared:,} prompts stand both in {first} and in {second}: "
                        f"figures of {second} are too good; give other splits, or let data.split make them"
                    )
    return notes


def format_of(rows: Dataset, source: Source) -> FormatName:
    """Name the format of a source's rows, its templates checked against their fields."""
    fields = fields_of(rows)
    check_templates(source.templates, fields, source.label)
    return detect_format(fields, source.templates, source.label)


def _check_found(source: Source, tables: dict[str, Dataset], split: Split) -> None:
    existing = ALL not in tables
    if split == "existing" and not {"train", "validation"} <= set(tables):
        raise UserError(
            f"data.split: existing, but {source.label} has {', '.join(tables) if existing else 'no splits'}; give "
            "path: {train: ..., validation: ..., test: ...} or a folder with train.* and validation.*"
        )
    if existing and isinstance(split, dict):
        raise UserError(
            f"data.split: {split}, but {source.label} has splits of its own ({', '.join(tables)}); "
            "use them (existing), or train on all of them (none)"
        )


def _group_hashes(rows: Dataset, source: Source, found_in: str) -> np.ndarray:
    to_example = FORMATS[format_of(rows, source)]
    hashes = np.empty(len(rows), dtype=np.uint64)
    errors: list[str] = []
    for start in range(0, len(rows), 1000):
        for i, row in enumerate(rows_of(rows[start : start + 1000]), start=start):
            try:
                hashes[i] = group_hash(_prompt_text(to_example(row, source.templates)))
            except RowError as error:
                errors.append(f"{locate_row(source, found_in, i)}: {error}")
                if len(errors) == MAX_ROW_ERRORS:
                    raise UserError(*errors) from error
    if errors:
        raise UserError(*errors)
    return hashes


def _prompt_text(example: Example) -> str:
    if "messages" in example:
        turns = example["messages"]
        first_answer = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return json.dumps(turns[:first_answer], ensure_ascii=False, sort_keys=True)
    return example["text"] if "text" in example else example["prompt"]
