"""Tokenizers trained from texts, over bytes: whatever text comes later, nothing of it is lost and nothing unknown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fine_tune.errors import UserError

Kind = Literal["bpe", "wordpiece", "unigram"]
PAD, EOS = "<pad>", "<eos>"
SPECIAL_TOKENS = [PAD, EOS, "<system>", "<user>", "<assistant>"]
FILES = ("tokenizer.json", "tokenizer_config.json")
NUM_BYTES, MAX_LENGTH = 256, 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' ~ message['role'] ~ '>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Before pieces inside a word, for WordPiece. No byte is written as this character, so no text can look like it.
INSIDE = "▁"


def least_tokens(kind: Kind, special_tokens: list[str]) -> int:
    """Return the tokens a vocabulary must have: the special ones and the bytes, at both places for WordPiece."""
    return len(special_tokens) + NUM_BYTES * (2 if kind == "wordpiece" else 1)


def train(
    texts: Iterable[str],
    kind: Kind,
    vocab_size: int,
    *,
    special_tokens: list[str] = SPECIAL_TOKENS,
    min_frequency: int = 0,
) -> Tokenizer:
    """Train a tokenizer whose numbers are cut into digits and whose spaces belong to the word behind them.

    Args:
        texts: Read once.
        kind: bpe (merges of frequent pairs), wordpiece (merges by likelihood, longest match first), unigram (a language
            model over pieces).
        vocab_size: Tokens at most, special tokens and bytes included.
        special_tokens: Never cut, never made from text by mistake; the first pads, the second ends.
        min_frequency: How often a pair must stand before it becomes a token; not for unigram.

    Raises:
        UserError: The vocabulary cannot hold bytes and special tokens.
    """
    least = least_tokens(kind, special_tokens)
    if vocab_size < least:
        raise UserError(
            f"--vocab_size: {vocab_size} is too small; bytes and special tokens alone are {least} for {kind}"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shared: dict[str, Any] = {
        "special_tokens": special_tokens,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    inside: list[decoders.Decoder] = []
    trainer: trainers.Trainer
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, **shared)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=PAD, continuing_subword_prefix=INSIDE))
        inside = [decoders.Replace(Regex(f"^{INSIDE}"), "")]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size - NUM_BYTES,
            min_frequency=min_frequency,
            continuing_subword_prefix=INSIDE,
            **shared,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, **shared)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = (
        decoders.Sequence([*inside, decoders.ByteLevel()]) if inside else decoders.ByteLevel()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_bytes_inside(tokenizer, alphabet) if kind == "wordpiece" else tokenizer


def _with_bytes_inside(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    """Let every byte continue a word, those too that no text had there."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in alphabet:
        vocabulary.setdefault(INSIDE + byte, len(vocabulary))
    return Tokenizer.from_str(json.dumps(state))


def save(tokenizer: Tokenizer, folder: Path, special_tokens: list[str] = SPECIAL_TOKENS) -> None:
    """Write a tokenizer as transformers reads it; the same tokenizer gives the same bytes."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special_tokens[0],
        "eos_token": special_tokens[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    texts = {FILES[0]: tokenizer.to_str(pretty=True), FILES[1]: json.dumps(config, indent=2)}
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
