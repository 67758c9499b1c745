"""Raw sources -> encoded rows per split, once: split, searched for leakage, encoded, audited, and cached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from fine_tune.data.audit import audit, drift_notes, preference_notes
from fine_tune.data.choices import longest_up_to_128
from fine_tune.data.encode import Encoder
from fine_tune.data.encode_rows import column, encode_part, sequence_lengths
from fine_tune.data.leakage import find_leakage, leakage_notes
from fine_tune.data.options import Options
from fine_tune.data.parts import Part, shared_prompts, split_sources
from fine_tune.data.sealed import row_digests
from fine_tune.data.sources import Source, read_source
from fine_tune.data.split import SPLITS
from fine_tune.data.token_cache import PreparedData, TokenCache
from fine_tune.errors import UserError


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
    cache = TokenCache(cache_dir, sources, tokenizer)
    with cache.lock():
        prepared = cache.open(cache.resolved(options))
        if prepared is not None:
            return prepared
        max_length = _prepare(sources, tokenizer, options, cache)
        cache.note_length(options, max_length)
        prepared = cache.open(replace(options, max_length=max_length))
        assert prepared is not None
        prepared.cached = False
        return prepared


def _prepare(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    cache: TokenCache,
) -> int:
    with cache.scratch() as scratch:  # no cache but ours
        found = [(source, read_source(source, scratch)) for source in sources]
        split = split_sources(found, options)
        parts, notes = split.parts, list(split.notes)
        if not any(part.split == "train" for part in parts):
            raise UserError(f"data.path: no train split, only {', '.join(p.split for p in parts)}")
        _refuse_empty(_num_rows(parts))
        leakage, leaked = find_leakage(parts, options.near_duplicates)
        if options.drop_leaked:
            parts = [_without(part, leaked) if part.split == "train" else part for part in parts]
            _refuse_empty(
                _num_rows(parts),
                "data.drop_leaked",
                "every training row stands in another split too; leave it false, or split anew",
            )
            kept, _ = find_leakage([p for p in parts if p.split == "train"], leakage.threshold)
            leakage.within["train"] = kept.within["train"]
            leakage.dropped_from_train = len(leaked)
        notes += shared_prompts(parts)
        encoded, max_length = _encode(parts, tokenizer, options)
        rows = {
            s: r.select(np.flatnonzero(column(r, "num_supervised"))) for s, r in encoded.items()
        }
        _refuse_empty(
            {split: len(of_split) for split, of_split in rows.items()},
            "data.max_length",
            f"no row fits {max_length} tokens under data.truncation {options.truncation}; raise it",
        )
        if cache.open(replace(options, max_length=max_length)) is not None:
            return max_length  # another model's positions led to the same tokens
        found_out = audit(encoded, parts, leakage, split.left_out)
        notes += [*leakage_notes(leakage), *drift_notes(found_out["drift"])]
        notes += preference_notes(found_out["preferences"])
        notes += _truncation_notes(encoded, max_length, options)
        facts: dict[str, Any] = {"notes": notes, "audit": found_out}
        facts["test_rows"] = row_digests(part for part in parts if part.split == "test")
        cache.write(rows, facts, options, max_length)
    return max_length


def _encode(
    parts: list[Part], tokenizer: PreTrainedTokenizerBase, options: Options
) -> tuple[dict[str, Dataset], int]:
    def encode(split: str, max_length: int) -> Dataset:
        encoder = Encoder(
            tokenizer,
            max_length=max_length,
            truncation=options.truncation,
            assistant_turns=options.assistant_turns,
        )
        mine = [part for part in parts if part.split == split and len(part.rows)]
        return concatenate_datasets([encode_part(part, encoder) for part in mine])

    names = {part.split for part in parts}
    train = encode("train", options.max_length or options.length_cap)
    longest = int(sequence_lengths(train).max())
    max_length = options.max_length or longest_up_to_128(longest, options.length_cap)
    return {
        "train": train,
        **{s: encode(s, max_length) for s in SPLITS[1:] if s in names},
    }, max_length


def _without(part: Part, row_ids: np.ndarray) -> Part:
    return part.take(np.flatnonzero(~np.isin(part.row_ids, row_ids)))


def _num_rows(parts: list[Part]) -> dict[str, int]:
    names = [split for split in SPLITS if any(part.split == split for part in parts)]
    return {s: sum(len(part.rows) for part in parts if part.split == s) for s in names}


def _refuse_empty(
    num_rows: dict[str, int],
    key: str = "data.split",
    how: str = "give more rows, other ratios, row counts like {validation: 20, test: 20}, or none",
) -> None:
    empty = [split for split, count in num_rows.items() if count == 0]
    if empty:
        sizes = ", ".join(f"{split} {count}" for split, count in num_rows.items())
        raise UserError(f"{key}: no rows are left for {', '.join(empty)} ({sizes}); {how}")


def _truncation_notes(encoded: dict[str, Dataset], max_length: int, options: Options) -> list[str]:
    longer = f"{max_length} tokens ({options.truncation})"
    notes = []
    for split, rows in encoded.items():
        counts = {
            f"{split}: {{}} rows truncated to {longer}": column(rows, "num_cut") > 0,
            f"{split}: {{}} supervised tokens lost to truncation": column(
                rows, "num_supervised_cut"
            ),
            f"{split}: {{}} rows left out, longer than {longer}": column(rows, "num_supervised")
            == 0,
        }
        notes += [text.format(f"{int(n.sum()):,}") for text, n in counts.items() if n.any()]
    return notes
