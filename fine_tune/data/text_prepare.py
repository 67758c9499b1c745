"""Texts -> packed rows per split on disk, once: streamed, split by document, tokenized, packed, written as they come.

Memory holds a batch of documents and a window of pieces, however many there are; training maps the rows from the disk.
With a curriculum, training documents are packed in its order, once all have come.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from fine_tune.data.documents import Document, Unit, documents, text_files
from fine_tune.data.encode_rows import token_counts
from fine_tune.data.options import Options
from fine_tune.data.sources import SPLIT_NAMES, Source
from fine_tune.data.split import SPLITS
from fine_tune.data.text_facts import HASH_BYTES, count_repeated, text_facts
from fine_tune.data.text_order import DocumentSorter, difficulty_of
from fine_tune.data.text_rows import PackedRow, Packer
from fine_tune.data.token_cache import PreparedData, TokenCache
from fine_tune.errors import UserError

RATIOS = {"train": 0.96, "validation": 0.02, "test": 0.02}
DOCUMENTS_AT_ONCE, ROWS_AT_ONCE = 1_000, 500
HASHES, UNSORTED = "train.hashes", "train.unsorted"
LONGEST_TEXT = 2**20  # characters tokenized at once; longer documents are cut before a space
FEATURES = Features(
    {
        "input_ids": datasets.List(Value("int32")),
        "pieces": datasets.List(Value("int32")),  # tokens of each, in the order of input_ids
        "documents": datasets.List(Value("int64")),  # where each comes from
        "row_id": Value("int64"),
        "weight": Value("float64"),
        "num_supervised": Value("int32"),
        "difficulty": Value("float64"),  # what a curriculum sorts by
        "num_prompt": Value("int32"),
        "num_chosen": Value("int32"),
        "margin": Value("float64"),
    }
)


@dataclass
class TextSource(Source):
    """Texts, and how documents are found in them.

    Args:
        field: Where a row holds its text.
        document: What is one of a ``.txt``.
        sorted_by: A field of the rows, or ``length``, that a curriculum sorts by; None without one.
    """

    field: str = "text"
    document: Unit = "line"
    sorted_by: str | None = None


@dataclass
class _Split:
    """One split as it is written."""

    writer: ArrowWriter
    packer: Packer
    file: Path
    num_rows: int = 0
    num_documents: int = 0
    num_bytes: int = 0
    held: list[dict[str, Any]] = field(default_factory=list)
    difficulties: dict[int, float] = field(default_factory=dict)
    hashes: BinaryIO | None = None  # of training documents, to find the repeated ones
    sorter: DocumentSorter | None = None  # of training documents, for a curriculum


def prepare_text(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, options: Options, cache_dir: Path
) -> PreparedData:
    """Tokenize and pack all documents, or open what an earlier run left in the cache.

    Args:
        source: Where texts come from.
        tokenizer: The model's tokenizer.
        options: ``max_length`` tokens a row, ``split`` by documents, ``max_rows`` documents per split at most.
        cache_dir: Folder that holds the cache; another process preparing the same data is waited for.

    Raises:
        UserError: No text, a broken one, or a split that gets none.
    """
    assert options.max_length is not None
    datasets.disable_progress_bars()
    for path in [source.path] if isinstance(source.path, str) else source.path.values():
        text_files(path)  # there, before anything is hashed
    cache = TokenCache(cache_dir, [source], tokenizer)
    with cache.lock():
        prepared = cache.open(options)
        if prepared is not None:
            return prepared
        with cache.scratch() as scratch:
            rows, facts = _packed(source, tokenizer, options, scratch)
            cache.write(rows, facts, options, options.max_length)
        prepared = cache.open(options)
        assert prepared is not None
        prepared.cached = False
        return prepared


def located(source: TextSource, numbers: set[int]) -> dict[int, str]:
    """Say where documents stand, by their numbers; the files are read up to the last of them."""
    found: dict[int, str] = {}
    for number, (_, document) in enumerate(_documents(source)):
        if number in numbers:
            found[number] = document.where
        if len(found) == len(numbers):
            break
    return found


def _documents(source: TextSource) -> Iterator[tuple[str | None, Document]]:
    """Give documents with the split their path belongs to, None where their words decide."""
    paths: list[tuple[str | None, str]]
    if isinstance(source.path, str):
        paths = [(None, source.path)]
    else:
        paths = [(SPLIT_NAMES[name], path) for name, path in source.path.items()]
    for split, path in paths:
        for document in documents(text_files(path), source.field, source.document):
            yield split, document


def _packed(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, options: Options, scratch: Path
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    test_rows: list[str] = []
    limits = options.max_rows
    with ExitStack() as stack:
        splits: dict[str, _Split] = {}
        batch: list[tuple[int, str, Document]] = []
        for number, (given, document) in enumerate(_documents(source)):
            words = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
            name = given or _side(words, options.split)
            if name not in splits:
                splits[name] = _open(name, source, options, scratch, stack)
            split = splits[name]
            if split.num_documents >= limits.get(name, split.num_documents + 1):
                continue
            split.num_documents += 1
            split.num_bytes += len(document.text.encode())
            if split.hashes is not None:
                split.hashes.write(words[:HASH_BYTES])
            if name == "test":
                test_rows.append(words.hex()[:16])
            batch.append((number, name, document))
            if len(batch) == DOCUMENTS_AT_ONCE:
                _add(splits, batch, tokenizer, source)
                batch = []
        _add(splits, batch, tokenizer, source)
        for split in splits.values():
            _pack_sorted(split)
            _write(split, split.packer.rest(), last=True)
    _refuse_empty(splits, options)
    rows = {name: Dataset.from_file(str(splits[name].file)) for name in SPLITS if name in splits}
    told = [line for name in rows for line in _told(name, rows[name], splits[name], options)]
    num_bytes = {name: split.num_bytes for name, split in splits.items()}
    facts = text_facts(rows, told, num_bytes, count_repeated(scratch / HASHES))
    return rows, facts | {"test_rows": sorted(test_rows)}


def _side(words: bytes, split: Any) -> str:
    ratios = RATIOS if split is None else {"train": 1.0} if split == "none" else split
    unit, end = int.from_bytes(words[:8], "big") / 2**64, 0.0
    for name in ("test", "validation"):
        end += ratios.get(name, 0.0)
        if unit < end:
            return name
    return "train"


def _open(
    name: str, source: TextSource, options: Options, scratch: Path, stack: ExitStack
) -> _Split:
    assert options.max_length is not None
    file = scratch / f"{name}.arrow"
    writer = stack.enter_context(ArrowWriter(path=str(file), features=FEATURES))
    hashes = stack.enter_context((scratch / HASHES).open("wb")) if name == "train" else None
    split = _Split(writer, Packer(options.max_length), file, hashes=hashes)
    if name == "train" and source.sorted_by is not None:
        handle = stack.enter_context((scratch / UNSORTED).open("wb"))
        split.sorter = DocumentSorter(scratch / UNSORTED, handle)
    return split


def _add(
    splits: dict[str, _Split],
    batch: list[tuple[int, str, Document]],
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
) -> None:
    if not batch:
        return
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = [list(_parts(document.text)) for _, _, document in batch]
    flat = [part for parts in texts for part in parts]
    # split: "<eos>" in a text is text
    encoded = iter(
        tokenizer(flat, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )
    for (number, name, document), parts in zip(batch, texts, strict=True):
        ids = [first, *(token for _ in parts for token in next(encoded)), tokenizer.eos_token_id]
        split = splits[name]
        by = source.sorted_by
        difficulty = 0.0 if by is None else difficulty_of(document, by, len(ids))
        if split.sorter is not None:
            split.sorter.add(number, ids, difficulty)
        else:
            _write(split, split.packer.add(number, ids))


def _pack_sorted(split: _Split) -> None:
    if split.sorter is None:
        return
    split.packer.window = split.sorter.window
    for number, ids, difficulty in split.sorter.easiest_first():
        split.difficulties[number] = difficulty
        _write(split, split.packer.add(number, ids))
        if split.packer.is_empty:
            split.difficulties.clear()


def _parts(text: str) -> Iterator[str]:
    """Cut a text that is too long to be tokenized at once, before a space where there is one."""
    while len(text) > LONGEST_TEXT:
        end = text.rfind(" ", LONGEST_TEXT // 2, LONGEST_TEXT)
        end = end if end > 0 else LONGEST_TEXT
        yield text[:end]
        text = text[end:]
    yield text


def _write(split: _Split, rows: Iterator[PackedRow], *, last: bool = False) -> None:
    for row in rows:
        of = [split.difficulties.get(number, 0.0) for number in row.documents]
        split.held.append(
            {
                "input_ids": [token for piece in row.pieces for token in piece],
                "pieces": [len(piece) for piece in row.pieces],
                "documents": row.documents,
                "row_id": split.num_rows,
                "weight": 1.0,
                "num_supervised": row.num_tokens - len(row.pieces),
                "difficulty": sum(of) / len(of),
                "num_prompt": 0,
                "num_chosen": 0,
                "margin": 0.0,
            }
        )
        split.num_rows += 1
    if split.held and (last or len(split.held) >= ROWS_AT_ONCE):
        names = list(FEATURES)
        split.writer.write_batch({n: [row[n] for row in split.held] for n in names})
        split.held = []
    if last:
        split.writer.finalize()


def _refuse_empty(splits: dict[str, _Split], options: Options) -> None:
    count = sum(split.num_documents for split in splits.values())
    if count == 0:
        raise UserError("data.path: no text to train on; the files hold nothing but blanks")
    wanted = {"train"}
    if options.split == "existing":
        wanted |= set(splits)
    elif options.split != "none":
        ratios = RATIOS if options.split is None else options.split
        wanted |= {name for name, share in ratios.items() if share > 0}
    empty = [name for name in SPLITS if name in wanted and not _num_rows(splits, name)]
    if empty:
        raise UserError(
            f"data.split: no documents are left for {', '.join(empty)} (of {count:,} documents); give more, other "
            "ratios, data.document: line or paragraph, or none"
        )


def _num_rows(splits: dict[str, _Split], name: str) -> int:
    return splits[name].num_rows if name in splits else 0


def _told(name: str, rows: Dataset, split: _Split, options: Options) -> Iterator[str]:
    assert options.max_length is not None
    full = token_counts(rows).sum() / (options.max_length * len(rows))
    num_documents = f"{split.num_documents:,} documents"
    yield f"{name}: {num_documents} of {split.num_bytes / 1e6:,.1f} MB in rows {full:.1%} full"
    if split.num_documents == options.max_rows.get(name):
        yield f"{name}: cut after {num_documents} (data.max_rows)"
