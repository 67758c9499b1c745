"""Prepared rows on disk, kept by all that decides them: data, tokenizer and options. Test rows lie apart, sealed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fine_tune.data.encode_rows import column, sequence_lengths, token_counts
from fine_tune.data.options import Options
from fine_tune.data.sealed import SealedTest
from fine_tune.data.sources import Source, fingerprint
from fine_tune.data.split import SPLITS
from fine_tune.errors import UserError
from fine_tune.runs.disk import told_by_path

CACHE = "data.cache_dir"
SCRATCH_BYTES = 1_000_000  # of raw rows as they are read; how much is known only afterwards
ENCODING_VERSION = (
    5  # part of the keys: raise it when the same input gives other tokens or other splits
)


@dataclass
class PreparedData:
    """What preparation leaves behind.

    Args:
        rows: Encoded rows of train and validation.
        facts: Counts per split (``splits``), the ``audit``, lines the user should read (``notes``).
        test: The sealed test split; None without one.
        max_length: The one in force.
        cached: Whether an earlier run had prepared it.
    """

    rows: dict[str, Dataset]
    facts: dict[str, Any]
    test: SealedTest | None
    max_length: int
    cached: bool = True


class TokenCache:
    """The cache of some data with a tokenizer.

    Args:
        folder: Where all caches lie; ``tokens`` and ``test_splits`` under it.
        sources: The data.
        tokenizer: The tokenizer.

    Raises:
        UserError: The folder cannot be made, or the data cannot be found.
    """

    def __init__(
        self, folder: Path, sources: list[Source], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.folder, self.tokens, self.tests = folder, folder / "tokens", folder / "test_splits"
        try:
            self.tokens.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # the latter for a zero byte
            told = getattr(error, "strerror", None) or error
            raise UserError(f"data.cache_dir: '{self.tokens}' cannot be made: {told}") from error
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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this data and tokenizer, whatever the options: another process that prepares it waits."""
        with FileLock(self.tokens / f"{_hash(self._parts)}.lock"):
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a folder for raw rows while they are read; what killed processes left of theirs goes, too."""
        for left in (*self.folder.glob(".reading-*"), *self.tokens.glob("*.unfinished-*")):
            process = re.search(r"-(\d+)(-|$)", left.name)
            if process and not psutil.pid_exists(int(process[1])):
                shutil.rmtree(left, ignore_errors=True)
        with (
            told_by_path(self.folder, SCRATCH_BYTES, CACHE, only_full=True),
            TemporaryDirectory(dir=self.folder, prefix=f".reading-{os.getpid()}-") as folder,
        ):
            yield Path(folder)

    def resolved(self, options: Options) -> Options:
        """Fill in what the longest training row came to, if it is known."""
        file = self._length_file(options)
        text = file.read_text() if options.max_length is None and file.is_file() else ""
        return replace(options, max_length=int(text)) if text.isdigit() else options

    def open(self, options: Options) -> PreparedData | None:
        """Open what was prepared; None if it is not there, not whole, or not what ``options`` allow."""
        if options.max_length is None:
            return None
        folder = self.tokens / self._key(options)
        try:
            facts = json.loads((folder / "facts.json").read_text("utf-8"))
            test = SealedTest.at(self.tests, facts, self._key(options))
            names = [split for split in SPLITS if split in facts["splits"] and split != "test"]
            rows = {split: load_from_disk(str(folder / split)) for split in names}
        except (OSError, ValueError, KeyError):
            return None
        if options.empty_completions == "error" and facts["audit"]["empty_completions"]:
            return None
        return PreparedData(rows, facts, test, options.max_length)

    def write(
        self, rows: dict[str, Dataset], facts: dict[str, Any], asked: Options, max_length: int
    ) -> None:
        """Write prepared rows: beside their place, then renamed; the test split first, and apart.

        Args:
            rows: Encoded rows per split.
            facts: What is kept of them; ``test_rows`` are the digests of the test rows.
            asked: The options, ``max_length`` perhaps open.
            max_length: What it came to.
        """
        key = self._key(replace(asked, max_length=max_length))
        facts["splits"] = {split: _counts(of_split) for split, of_split in rows.items()}
        folder = self.tokens / key
        unfinished = folder.with_name(f"{key}.unfinished-{os.getpid()}")
        needed = sum(of_split.data.nbytes for of_split in rows.values())
        try:
            with told_by_path(folder, needed, CACHE):
                if "test" in rows:
                    test_rows = facts.pop("test_rows")
                    facts |= SealedTest.write(self.tests, rows["test"], test_rows, key)
                for split, of_split in rows.items():
                    if split != "test":
                        of_split.save_to_disk(str(unfinished / split))
                text = json.dumps(facts, ensure_ascii=False)
                (unfinished / "facts.json").write_text(text, "utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def note_length(self, asked: Options, max_length: int) -> None:
        """Remember what an open ``max_length`` came to."""
        if asked.max_length is None:
            file = self._length_file(asked)
            unfinished = file.with_name(f"{file.name}.unfinished-{os.getpid()}")
            with told_by_path(file, 100, CACHE):
                unfinished.write_text(str(max_length))
                unfinished.replace(file)

    def _length_file(self, options: Options) -> Path:
        return self.tokens / f"{self._key(options)}.max_length"

    def _key(self, options: Options) -> str:
        options = replace(options, empty_completions="drop")  # "error" opens only what has none
        if options.max_length is not None:
            options = replace(options, length_cap=0)  # it decides nothing then
        return _hash([*self._parts, asdict(options)])


def _hash(parts: list[Any]) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _counts(rows: Dataset) -> dict[str, int]:
    lengths = token_counts(rows)
    ids = rows.with_format("arrow")["input_ids"][:]
    return {
        "num_rows": len(rows),
        "num_tokens": int(lengths.sum()),
        "num_supervised": int(column(rows, "num_supervised").sum()),
        "longest_row": int(sequence_lengths(rows).max()),
        "largest_token_id": int(pc.max(pc.list_flatten(ids)).as_py()),
    }
