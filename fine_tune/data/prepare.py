"""Raw sources -> encoded rows per split, once: cached by data + templates + tokenizer + options."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_from_disk
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fine_tune.data.audit import audit, drift_notes
from fine_tune.data.choices import longest_up_to_128
from fine_tune.data.encode import Encoder
from fine_tune.data.encode_rows import column, encode_part, token_counts
from fine_tune.data.leakage import find_leakage, leakage_notes
from fine_tune.data.options import Options
from fine_tune.data.parts import Part, shared_prompts, split_sources
from fine_tune.data.sealed import open_sealed, seal, test_rows_hash
from fine_tune.data.sources import Source, fingerprint, read_source
from fine_tune.data.split import SPLITS
from fine_tune.errors import UserError

ENCODING_VERSION = (
    2  # part of the cache's key: raise it when the same input gives other tokens or other splits
)


@dataclass
class PreparedData:
    """What preparation leaves behind.

    Args:
        rows: Encoded rows of train and validation.
        facts: Counts per split (``splits``), the ``audit``, lines the user should read (``notes``), and of the sealed
            test split its ``test_hash`` and ``test_digest``.
        test_folder: Where the sealed test split lies; None without one.
        max_length: The one in force.
        cached: Whether an earlier run had prepared it.
    """

    rows: dict[str, Dataset]
    facts: dict[str, Any]
    test_folder: Path | None
    max_length: int
    cached: bool = True

    def open_test(self) -> Dataset:
        """Open the sealed test split."""
        assert self.test_folder is not None
        return open_sealed(self.test_folder, self.facts["test_digest"])


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
    tokens = cache_dir / "tokens"
    try:
        tokens.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: '{tokens}' cannot be made: {error.strerror}") from error
    keys = _Keys(sources, tokenizer)
    chosen = tokens / f"{keys.of(options)}.max_length"  # what the longest training row came to
    with FileLock(tokens / f"{keys.of(options)}.lock"):
        if options.max_length is None and chosen.is_file():
            options = replace(options, max_length=int(chosen.read_text()))
        prepared = _open(cache_dir, keys.of(options), options)
        if prepared is not None:
            return prepared
        max_length = _prepare(sources, tokenizer, options, cache_dir, keys)
        if options.max_length is None:
            chosen.write_text(str(max_length))
        options = replace(options, max_length=max_length)
        prepared = _open(cache_dir, keys.of(options), options)
        assert prepared is not None
        prepared.cached = False
        return prepared


def _prepare(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    cache_dir: Path,
    keys: "_Keys",
) -> int:
    with TemporaryDirectory(dir=cache_dir, prefix=".reading-") as scratch:  # no cache but ours
        found = [(source, read_source(source, Path(scratch))) for source in sources]
        split = split_sources(found, options)
        parts, notes = split.parts, split.notes + shared_prompts(split.parts)
        if not any(part.split == "train" for part in parts):
            raise UserError(f"data.path: no train split, only {', '.join(p.split for p in parts)}")
        _refuse_empty(_num_rows(parts))
        leakage, leaked = find_leakage(parts, options.near_duplicates)
        if options.drop_leaked:
            parts = [_without(part, leaked) if part.split == "train" else part for part in parts]
            leakage.dropped_from_train = len(leaked)
            _refuse_empty(_num_rows(parts))
        encoded, max_length = _encode(parts, tokenizer, options)
        options = replace(options, max_length=max_length)
        found_out = audit(encoded, parts, leakage, split.num_empty)
        notes += [*leakage_notes(leakage), *drift_notes(found_out["drift"])]
        notes += _truncation_notes(encoded, options)
        rows = {
            s: r.select(np.flatnonzero(column(r, "num_supervised"))) for s, r in encoded.items()
        }
        _refuse_empty({split: len(of_split) for split, of_split in rows.items()})
        test_hash = test_rows_hash(part for part in parts if part.split == "test")
        facts = {
            "notes": notes,
            "audit": found_out,
            "test_hash": test_hash if "test" in rows else None,
        }
        _write(rows, facts, cache_dir, keys.of(options))
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
    longest = int(token_counts(train).max())
    max_length = options.max_length or longest_up_to_128(longest, options.length_cap)
    return {
        "train": train,
        **{s: encode(s, max_length) for s in SPLITS[1:] if s in names},
    }, max_length


def _write(rows: dict[str, Dataset], facts: dict[str, Any], cache_dir: Path, key: str) -> None:
    facts["splits"] = {split: _counts(of_split) for split, of_split in rows.items()}
    if "test" in rows:
        facts["test_digest"] = seal(rows["test"], _test_folder(cache_dir, facts["test_hash"], key))
    folder = cache_dir / "tokens" / key
    unfinished = folder.with_name(f"{key}.unfinished-{os.getpid()}")
    for split, of_split in rows.items():
        if split != "test":
            of_split.save_to_disk(str(unfinished / split))
    (unfinished / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _open(cache_dir: Path, key: str, options: Options) -> PreparedData | None:
    folder = cache_dir / "tokens" / key
    if options.max_length is None or not (folder / "facts.json").is_file():
        return None
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    test = _test_folder(cache_dir, facts["test_hash"], key) if facts["test_hash"] else None
    refused = options.empty_completions == "error" and facts["audit"]["empty_completions"]
    if refused or (test is not None and not test.is_dir()):
        return None
    rows = {s: load_from_disk(str(folder / s)) for s in SPLITS if (folder / s).is_dir()}
    return PreparedData(rows, facts, test, options.max_length)


def _test_folder(cache_dir: Path, test_hash: str, key: str) -> Path:
    return cache_dir / "test_splits" / test_hash / key


def _without(part: Part, row_ids: np.ndarray) -> Part:
    return part.take(np.flatnonzero(~np.isin(part.row_ids, row_ids)))


def _counts(rows: Dataset) -> dict[str, int]:
    lengths = token_counts(rows)
    ids = rows.with_format("arrow")["input_ids"][:]
    return {
        "num_rows": len(rows),
        "num_tokens": int(lengths.sum()),
        "num_supervised": int(column(rows, "num_supervised").sum()),
        "longest_row": int(lengths.max()),
        "largest_token_id": int(pc.max(pc.list_flatten(ids)).as_py()),
    }


def _num_rows(parts: list[Part]) -> dict[str, int]:
    names = [split for split in SPLITS if any(part.split == split for part in parts)]
    return {s: sum(len(part.rows) for part in parts if part.split == s) for s in names}


def _refuse_empty(num_rows: dict[str, int]) -> None:
    empty = [split for split, count in num_rows.items() if count == 0]
    if empty:
        sizes = ", ".join(f"{split} {count}" for split, count in num_rows.items())
        raise UserError(
            f"data.split: no rows are left for {', '.join(empty)} ({sizes}); "
            "give more rows, other ratios, row counts like {validation: 20, test: 20}, or none"
        )


def _truncation_notes(encoded: dict[str, Dataset], options: Options) -> list[str]:
    longer = f"{options.max_length} tokens ({options.truncation})"
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


class _Keys:
    """The cache's keys for some data and a tokenizer."""

    def __init__(self, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> None:
        state = (
            tokenizer.backend_tokenizer.to_str()
            if tokenizer.is_fast
            else repr(sorted(tokenizer.get_vocab().items()))
        )
        self._parts = [
            ENCODING_VERSION,
            [{**asdict(source), "content": fingerprint(source)} for source in sources],
            hashlib.sha256(state.encode()).hexdigest(),
            tokenizer.chat_template,
            str(tokenizer.special_tokens_map),
        ]

    def of(self, options: Options) -> str:
        options = replace(options, empty_completions="drop")  # "error" opens only what has none
        if options.max_length is not None:
            options = replace(options, length_cap=0)  # it decides nothing then
        text = json.dumps([*self._parts, asdict(options)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
