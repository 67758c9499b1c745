"""A tokenizer from texts: nothing is lost, nothing unknown, and what it costs is told."""

import json
import random
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from harness import CommandLine, write_rows
from transformers import AutoTokenizer

from fine_tune.commands.train_tokenizer import Measured
from fine_tune.corpus import tokenizers

WORDS = [
    *("ibu", "kota", "negara", "provinsi", "benua", "mata", "uang", "tahun", "merdeka"),
    *("terletak", "adalah", "di", "Ĝangkok", "東京", "1945", "naïve"),
]
HOSTILE = [
    "tab\tand\nend  of   line \r\n",
    "▁INSIDE ##x ▁▁ Ġ Ċ",
    "\x00\x1b[31m \ud7ff \uffff \U0001f9d1‍\U0001f33e",
    "<|endoftext|> <unk> [UNK]",
    unicodedata.normalize("NFD", "é ü ñ") + unicodedata.normalize("NFC", "é ü ñ"),
    " leading and trailing ",
    "",
]


def texts(count: int = 400) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 20))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_any_text_comes_back_to_the_letter(kind: tokenizers.Kind, tmp_path: Path) -> None:
    size = tokenizers.least_tokens(kind, tokenizers.SPECIAL_TOKENS) + 60
    tokenizers.save(tokenizers.train(texts(), kind, size), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= size
    draw = random.Random(1)
    strange = ["".join(chr(draw.randrange(1, 0xD7FF)) for _ in range(30)) for _ in range(50)]
    for text in [*texts(5), *HOSTILE, *strange]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(range(len(tokenizers.SPECIAL_TOKENS)))


def test_special_tokens_have_the_first_ids_and_the_template_masks(tmp_path: Path) -> None:
    tokenizers.save(tokenizers.train(texts(), "bpe", 300), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    turns = [{"role": "user", "content": "ibu"}, {"role": "assistant", "content": "kota"}]
    encoded = tokenizer.apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    said = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(said) == "kota<eos>"


def test_the_command_trains_measures_and_compares(
    command_line: CommandLine, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(texts(200)), "utf-8")
    write_rows(folder / "b.jsonl", [{"text": text} for text in texts(100)])
    table = pyarrow.table({"text": texts(50)})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    args = ["train-tokenizer", "--input", json.dumps([str(folder)]), "--vocab_size", "300"]
    told = []
    for name in ("one", "two"):
        outcome = command_line(*args, "--output", tmp_path / name, "--beside", model_folder)
        assert outcome.code == 0, outcome.err
        told.append(outcome.out.replace(str(tmp_path / name), "HERE"))
    assert told[0] == told[1]
    first, second = ((tmp_path / n / "tokenizer.json").read_bytes() for n in ("one", "two"))
    assert first == second
    assert "300 tokens (bpe) from" in told[0]
    rows = [line.split() for line in told[0].splitlines() if line.startswith(("  HERE", "  /"))]
    assert [row[1] for row in rows] == ["300", "1,290"]
    own, other = (float(row[2]) for row in rows)
    assert own > 1 and other > 1
    refused = command_line(*args, "--output", tmp_path / "one")
    assert refused.code == 2
    assert "exist already" in refused.err


def test_figures_are_what_they_say() -> None:
    of = Measured(num_tokens=6, num_words=3, num_bytes=15)
    assert of.tokens_per_word == 2
    assert of.bytes_per_token == 2.5


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        (b"", [], "no text"),
        (b"\n \n", [], "no text"),
        (b"ibu kota\n\xff\xfe\x00", [], "a.txt:2: not UTF-8 (byte 0xff at 0)"),
        ("é".encode("latin-1"), [], "a.txt:1: not UTF-8"),
        (b"ibu kota", ["--vocab_size", "5000"], "the texts give 26"),
        (b"ibu kota", ["--vocab_size", "100"], "--vocab_size: 100 is too small"),
        (b"ibu kota", ["--held_out", "1"], "--held_out: lies from 0"),
        (b"ibu kota", ["--special_tokens", '["<a>"]'], "at least two different ones"),
    ],
)
def test_what_gives_no_tokenizer_is_refused(
    command_line: CommandLine, tmp_path: Path, content: bytes, more: list[str], told: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    args = ["--input", json.dumps([str(tmp_path / "a.txt")]), "--output", str(tmp_path / "t")]
    size = [] if "--vocab_size" in more else ["--vocab_size", "262"]
    refused = command_line("train-tokenizer", *args, *size, *more, "--min_frequency", "1")
    assert refused.code == 2
    assert told in refused.err
    assert not (tmp_path / "t").exists()


def test_rows_without_the_field_are_named(command_line: CommandLine, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "ibu"}, {"isi": "kota"}])
    args = ["--input", json.dumps([str(tmp_path / "a.jsonl")]), "--output", str(tmp_path / "t")]
    refused = command_line("train-tokenizer", *args)
    assert refused.code == 2
    assert (
        "a.jsonl:2: no text in 'text' (fields: isi); set data.field (train-tokenizer: --field)"
        in refused.err
    )


def test_one_folder_needs_no_list(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(50)), "utf-8")
    args = ["--input", tmp_path, "--output", tmp_path / "t", "--vocab_size", "270"]
    outcome = command_line("train-tokenizer", *args)
    assert outcome.code == 0, outcome.err
    assert "270 tokens (bpe) from" in outcome.out
