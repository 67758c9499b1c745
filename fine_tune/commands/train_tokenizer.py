"""`train-tokenizer`: a tokenizer fitted to texts, measured on texts it did not see, beside another if one is named."""

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fine_tune.commands.make_qa import refuse_existing
from fine_tune.corpus import tokenizers
from fine_tune.data.documents import Unit, documents, text_files
from fine_tune.errors import UserError
from fine_tune.models import load_tokenizer
from fine_tune.runs.lineage import write_tokenizer_origin

MOST_MEASURED = 20_000_000  # bytes of held-out text; more would say the same
BATCH = 256


@dataclass
class Measured:
    """How a tokenizer does on some texts.

    Args:
        num_tokens: Without special tokens.
        num_words: Between blanks.
        num_bytes: In UTF-8.
    """

    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0

    @property
    def tokens_per_word(self) -> float:
        """Fertility: 1 would be a token a word."""
        return self.num_tokens / max(1, self.num_words)

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for."""
        return self.num_bytes / max(1, self.num_tokens)


def train_tokenizer(
    input: list[str] | str,
    output: str,
    *,
    kind: tokenizers.Kind = "bpe",
    vocab_size: int = 32_000,
    min_frequency: int = 2,
    field: str = "text",
    special_tokens: list[str] | None = None,
    held_out: float = 0.05,
    beside: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train a tokenizer on texts, and say how many tokens it needs for texts it did not see.

    It works on bytes: no text is unknown to it, and what it encodes it gives back to the letter. Numbers are cut into
    digits. Its chat template marks what the assistant says, so that only that carries loss. The same texts give the
    same bytes.

    Args:
        input: A file or folder of texts, or several: .txt, .jsonl, .json, .csv, .parquet; read one after the other,
            never whole.
        output: Folder for the tokenizer, as any Hugging Face tool opens it.
        kind: bpe merges frequent pairs, wordpiece likely ones (longest match first), unigram keeps likely pieces.
        vocab_size: Tokens, the special ones and 256 bytes included (wordpiece: 512).
        min_frequency: How often a pair must stand before it becomes a token; not for unigram.
        field: Where a row of JSON, CSV or Parquet holds its text.
        special_tokens: Never cut, and never made from text; by default <pad>, <eos> and the roles of a conversation.
            The first pads, the second ends.
        held_out: Share of the texts that is not trained on but measured, chosen by their words.
        beside: Folder or hub name of another tokenizer that is measured on the same texts.
        overwrite: Whether to replace a tokenizer that is already there.

    Raises:
        UserError: If there is no text, it cannot be read, or it does not give so many tokens.
    """
    specials = special_tokens or tokenizers.SPECIAL_TOKENS
    if len(specials) < 2 or len(set(specials)) < len(specials) or not all(specials):
        raise UserError(
            f"--special_tokens: {specials}: at least two different ones, the first to pad and the second to end"
        )
    if not 0 <= held_out < 1:
        raise UserError(f"--held_out: lies from 0 up to, but not at, 1; got {held_out}")
    folder = Path(output)
    input = [input] if isinstance(input, str) else input
    refuse_existing([folder / name for name in tokenizers.FILES], overwrite)
    files = [file for path in input for file in text_files(path, "--input")]
    other = load_tokenizer("--beside", beside) if beside is not None else None
    read = _Read(files, field, held_out)
    tokenizer = tokenizers.train(
        read.trained(), kind, vocab_size, special_tokens=specials, min_frequency=min_frequency
    )
    found = tokenizer.get_vocab_size()
    if read.num_trained == 0:
        raise UserError(f"--input: {', '.join(input)}: no text")
    if found < vocab_size:
        raise UserError(
            f"--vocab_size: the texts give {found:,} tokens and no more, {vocab_size:,} were asked for; set "
            f"--vocab_size {found}, lower --min_frequency, or add texts"
        )
    tokenizers.save(tokenizer, folder, specials)
    write_tokenizer_origin(folder, files, kind=kind, vocab_size=found)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{found:,} tokens ({kind}) from {read.num_trained:,} texts of {read.num_bytes / 1e6:,.1f} MB: {folder}"
    )
    if held_out:
        own = load_tokenizer("--output", output)
        for line in _compared({str(folder): own, **({str(beside): other} if other else {})}, read):
            console.print(line)
    console.print(
        f"next: python -m fine_tune fit --config X --model.tokenizer {shlex.quote(str(folder))}"
    )


class _Read:
    """The texts, some of them held out by a hash of their words, so that the same text is always on one side."""

    def __init__(self, files: list[Path], field: str, held_out: float) -> None:
        self.files, self.field = files, field
        self.limit = held_out * 2**64
        self.num_trained = self.num_bytes = 0

    def trained(self) -> Iterator[str]:
        for text in self._texts():
            if not self._is_held_out(text):
                self.num_trained += 1
                self.num_bytes += len(text.encode())
                yield text

    def measured(self) -> Iterator[str]:
        left = MOST_MEASURED
        for text in self._texts():
            if self._is_held_out(text):
                left -= len(text.encode())
                yield text
            if left < 0:
                return

    def _texts(self) -> Iterator[str]:
        unit: Unit = "line"
        return (document.text for document in documents(self.files, self.field, unit))

    def _is_held_out(self, text: str) -> bool:
        words = " ".join(text.split()).encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") < self.limit


def _compared(compared: dict[str, Any], read: _Read) -> Iterator[str]:
    measured = {name: Measured() for name in compared}
    batch: list[str] = []

    def take() -> None:
        for name, tokenizer in compared.items():
            ids = tokenizer(batch, add_special_tokens=False)["input_ids"]
            measured[name].num_tokens += sum(map(len, ids))
            measured[name].num_words += sum(len(text.split()) for text in batch)
            measured[name].num_bytes += sum(len(text.encode()) for text in batch)
        batch.clear()

    num_texts = 0
    for text in read.measured():
        batch.append(text)
        num_texts += 1
        if len(batch) == BATCH:
            take()
    if batch:
        take()
    if num_texts == 0:
        yield "held out: nothing; the texts are too few (--held_out)"
        return
    size = next(iter(measured.values())).num_bytes
    yield f"on {num_texts:,} texts held out ({size / 1e6:.2f} MB):"
    width = max(map(len, compared))
    yield f"  {'tokenizer':<{width}}  vocabulary  tokens a word  bytes a token"
    for name, of in measured.items():
        yield (
            f"  {name:<{width}}  {len(compared[name]):>10,}  {of.tokens_per_word:>13.3f}  {of.bytes_per_token:>13.3f}"
        )
