"""Which rows of which source go to which split, before anything is tokenized."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from fine_tune.data.content import own_words
from fine_tune.data.files import fields_of, rows_of
from fine_tune.data.formats import detect_format
from fine_tune.data.options import Options, Split
from fine_tune.data.sources import ALL, Source, locate_row
from fine_tune.data.split import (
    DEFAULT_RATIOS,
    SPLITS,
    assign_splits,
    group_hash,
    is_counts,
    recommended_ratios,
)
from fine_tune.data.templates import EmptyCompletion, Row, RowError, SameAnswers, check_templates
from fine_tune.errors import UserError, nearest

MAX_ROW_ERRORS = 10


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one source that go to one split.

    ``positions`` are their places in the split ``found_in`` of the source; ``first_id`` is that split's first row id.
    ``groups`` and ``prompts`` are hashes of what keeps rows together; ``strata`` the values rows are stratified by.
    """

    source: Source
    format_name: str
    split: str
    found_in: str
    rows: Dataset
    positions: np.ndarray
    first_id: int
    groups: np.ndarray
    prompts: np.ndarray
    strata: np.ndarray

    @property
    def row_ids(self) -> np.ndarray:
        return self.first_id + self.positions

    def take(self, kept: np.ndarray, split: str | None = None) -> "Part":
        """Return these rows of the part, for a split of another name if one is given."""
        return replace(
            self,
            split=split or self.split,
            rows=self.rows.select(kept),
            positions=self.positions[kept],
            groups=self.groups[kept],
            prompts=self.prompts[kept],
            strata=self.strata[kept],
        )


@dataclass(frozen=True)
class SplitRows:
    """All rows, split; how many were left out (``empty``, or ``same`` answers); lines the user should read."""

    parts: list[Part]
    left_out: Counter[str]
    notes: list[str]


def split_sources(found: list[tuple[Source, dict[str, Dataset]]], options: Options) -> SplitRows:
    """Split the rows of all sources together, so that no group stands on two sides.

    Args:
        found: Each source with its rows, under ``"all"`` or its own splits.
        options: How to split: ratios, row counts, ``existing``, ``none``, or None (existing splits where there are,
            else ratios); what keeps rows together; how many rows of a source a split may have.

    Raises:
        UserError: The data does not have what ``split`` asks for, or a row cannot be read.
    """
    read, first_id, left_out = [], 0, Counter[str]()
    for source, tables in found:
        _check_found(source, tables, options.split)
        for name, rows in tables.items():
            split = "train" if options.split == "none" else name
            part, without = _read_part(rows, source, split, name, first_id, options)
            read.append(part)
            left_out += without
            first_id += len(rows)
    to_split = [p for p in read if p.found_in == ALL and options.split != "none"]
    sizes = options.split if isinstance(options.split, dict) else DEFAULT_RATIOS
    wanted = [s for s in SPLITS if s == "train" or sizes.get(s, 0) > 0]
    sides = iter(_sides(to_split, sizes, options.stratify_by is not None))
    parts = []
    for part in read:
        if part in to_split:
            mine = next(sides)
            parts += [part.take(np.flatnonzero(mine == SPLITS.index(s)), s) for s in wanted]
        else:
            parts.append(part)
    limited = [
        p.take(np.arange(min(len(p.rows), options.max_rows.get(p.split, len(p.rows)))))
        for p in parts
    ]
    return SplitRows(limited, left_out, _notes(to_split, options, left_out))


def shared_prompts(parts: list[Part]) -> list[str]:
    """Say which splits share prompts: possible where the data came with splits or groups of its own."""
    by_split = {
        s: np.unique(np.concatenate([p.prompts for p in parts if p.split == s]))
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


def field_value(row: Row, name: str, key: str) -> str:
    """Return a field that rows are grouped or stratified by, as text.

    Raises:
        RowError: The row has null in it; ``key`` is the setting that names it.
    """
    if row.get(name) is None:
        raise RowError(f"{key}: the field '{name}' is null; give every row a value")
    return str(row[name])


def shortened(value: str) -> str:
    """Return a value, or the beginning and the hash of one too long for a name."""
    return value if len(value) <= 60 else f"{value[:40]}... {group_hash(value):x}"


def _read_part(
    rows: Dataset, source: Source, split: str, found_in: str, first_id: int, options: Options
) -> tuple[Part, Counter[str]]:
    format_name = _format_of(rows, source)
    for key in ("group_by", "stratify_by"):
        name, fields = getattr(options, key), fields_of(rows)
        if name is not None and name not in fields:
            raise UserError(
                f"{source.label}: data.{key}: the field '{name}' is missing, the rows have {sorted(fields)}"
                f"{nearest(name, fields)}"
            )
    positions: list[int] = []
    groups, prompts, strata, errors, left_out = [], [], [], [], Counter[str]()
    wanted = options.max_rows.get(split, len(rows))  # all of "all", which is still to be split
    for start in range(0, len(rows), 1000):
        if len(positions) >= wanted:
            break
        for i, row in enumerate(rows_of(rows[start : start + 1000]), start=start):
            try:
                prompt = own_words(row, format_name, source.templates).prompt
                group = prompt
                if options.group_by:
                    group = field_value(row, options.group_by, "data.group_by")
                stratum = ""
                if options.stratify_by:
                    stratum = shortened(field_value(row, options.stratify_by, "data.stratify_by"))
            except RowError as error:
                if isinstance(error, EmptyCompletion) and options.empty_completions == "drop":
                    left_out["same" if isinstance(error, SameAnswers) else "empty"] += 1
                    continue
                errors.append(f"{locate_row(source, found_in, i)}: {error}{_hint(error)}")
                if len(errors) == MAX_ROW_ERRORS:
                    raise UserError(*errors) from error
                continue
            positions.append(i)
            strata.append(stratum)
            groups.append(group_hash(group))
            prompts.append(group_hash(prompt))
    if errors:
        raise UserError(*errors)
    part = Part(
        source,
        format_name,
        split,
        found_in,
        rows.select(positions) if len(positions) < len(rows) else rows,
        np.array(positions, dtype=np.int64),
        first_id,
        np.array(groups, dtype=np.uint64),
        np.array(prompts, dtype=np.uint64),
        np.array(strata, dtype=np.str_),
    )
    return part, left_out


def _sides(parts: list[Part], sizes: dict[str, float], stratified: bool) -> list[np.ndarray]:
    if not parts:
        return []
    strata = np.concatenate([part.strata for part in parts]) if stratified else None
    sides = assign_splits(np.concatenate([part.groups for part in parts]), sizes, strata)
    return np.split(sides, np.cumsum([len(part.rows) for part in parts])[:-1])


def _notes(to_split: list[Part], options: Options, left_out: Counter[str]) -> list[str]:
    why = {"empty": "with an empty answer", "same": "with twice the same answer"}
    notes = [f"{left_out[kind]:,} rows {why[kind]} left out" for kind in why if left_out[kind]]
    by_field = [key for key in ("group_by", "stratify_by") if getattr(options, key)]
    if not to_split:
        notes += [f"WARNING: data.{key} has no effect: no rows are split here" for key in by_field]
        return notes
    num_rows = sum(len(part.rows) for part in to_split)
    recommended = recommended_ratios(num_rows)
    if options.split is None and recommended != DEFAULT_RATIOS:
        shown = ", ".join(f"{name}: {share:g}" for name, share in recommended.items())
        size = "fewer than 10,000" if num_rows < 10_000 else "more than 100,000"
        notes.append(f"recommended for {size} rows: --data.split '{{{shown}}}'")
    exact = isinstance(options.split, dict) and is_counts(options.split)
    if exact or options.stratify_by:
        how = "row counts" if exact else "strata"
        notes.append(
            f"split by {how}: exact up to whole groups; adding rows may move boundary rows"
        )
    return notes


def _format_of(rows: Dataset, source: Source) -> str:
    fields = fields_of(rows)
    check_templates(source.templates, fields, source.label)
    return detect_format(fields, source.templates, source.label)


def _check_found(source: Source, tables: dict[str, Dataset], split: Split | None) -> None:
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


def _hint(error: RowError) -> str:
    return (
        "; leave such rows out with --data.empty_completions drop"
        if isinstance(error, EmptyCompletion)
        else ""
    )
