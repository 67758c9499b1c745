"""Pretraining on texts: what is trained on, what is measured, and what is refused."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CommandLine, assert_same_weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.data import TextData
from fine_tune.data.steps import StepSampler

WORDS = ["ibu", "kota", "negara", "provinsi", "benua", "mata", "uang", "tahun", "adalah", "di"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 60))) for _ in range(count)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts(300)), "utf-8")
    return file


@pytest.fixture
def text_args(model_folder: Path, text_file: Path) -> list[str]:
    """The flags of a small pretraining run of 6 steps of 4 rows of 64 tokens."""
    return [
        *("--model", "fine_tune.modules.Pretrain", "--model.model_name_or_path", str(model_folder)),
        *("--data", "fine_tune.data.TextData", "--data.path", str(text_file)),
        *("--data.max_length", "64", "--data.batch_size", "4", "--trainer.max_steps", "6"),
        *("--data.split", "{train: 0.8, validation: 0.1, test: 0.1}"),
        *("--model.optimizer.lr", "1e-3", "--trainer.log_every_n_steps", "1"),
        *("--generations.rows", "0", "--report", "null"),
    ]


def prepared(file: Path, model_folder: Path, tmp_path: Path, **options: object) -> TextData:
    data = TextData(
        str(file), tokenizer=str(model_folder), cache_dir=str(tmp_path / "c"), **options
    )  # type: ignore[arg-type]
    data.prepare_data()
    return data


def test_rows_hold_every_document_once_behind_its_beginning(
    text_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = prepared(text_file, model_folder, tmp_path, split="none", max_length=64)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    eos = tokenizer.eos_token_id
    found: dict[int, list[list[int]]] = {}
    rows = data.rows("train")
    for row in rows:
        assert len(row["input_ids"]) <= 64
        ids = iter(row["input_ids"])
        for length, document in zip(row["pieces"], row["documents"], strict=True):
            found.setdefault(document, []).append([next(ids) for _ in range(length)])
    for number, text in enumerate(texts(300)):
        pieces = sorted(found[number], key=len, reverse=True)
        wanted = [eos, *tokenizer(text)["input_ids"], eos]
        whole = next(piece for piece in pieces if piece[0] == eos and piece[1] != eos)
        rest = [piece for piece in pieces if piece is not whole]
        while rest:  # a piece begins with the last token of the one before
            after = next(p for p in rest if wanted[len(whole) - 1 : len(whole) - 1 + len(p)] == p)
            whole = whole + after[1:]
            rest.remove(after)
        assert whole == wanted
    assert sum(map(len, rows["input_ids"])) / (64 * len(rows)) > 0.95


def test_special_tokens_in_a_text_are_text(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("satu <eos> dua <user> tiga\n", "utf-8")
    data = prepared(tmp_path / "a.txt", model_folder, tmp_path, split="none", max_length=128)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (row,) = data.rows("train")
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(row["input_ids"][1:-1]) == "satu <eos> dua <user> tiga"


def test_loss_and_bits_per_byte_are_those_of_the_documents_alone(
    command_line: CommandLine, text_args: list[str]
) -> None:
    outcome = command_line("fit", *text_args)
    assert outcome.code == 0, outcome.err
    run = outcome.run()
    (result,) = [r for r in run.read()["results"] if r["split"] == "validation"]
    folder = run.checkpoint("best")
    assert folder is not None
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cache = run.path.parents[1] / ".cache"
    (facts,) = [json.loads(f.read_text()) for f in cache.glob("tokens/*/facts.json")]
    from datasets import load_from_disk

    (rows,) = [load_from_disk(str(f)) for f in cache.glob("tokens/*/validation")]
    held_out = sorted({n for documents in rows["documents"] for n in documents})
    total, count, num_bytes = 0.0, 0, 0
    for text in (text for n, text in enumerate(texts(300)) if n in held_out):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, 63):
            piece = torch.tensor([ids[start : start + 64]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
            count += piece.shape[1] - 1
    assert facts["num_bytes"]["validation"] == num_bytes
    assert result["metrics"]["val/loss"] == pytest.approx(total / count, rel=1e-5)
    bits = total / num_bytes / math.log(2)
    assert result["metrics"]["val/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert "val/bits_per_byte" in outcome.metrics()[-1]


@pytest.mark.parametrize("budget", [64, 100, 4096])
def test_micro_batches_change_nothing(
    command_line: CommandLine, text_args: list[str], budget: int
) -> None:
    losses = []
    for tokens in (256, budget):
        outcome = command_line("fit", *text_args, "--data.max_tokens_per_micro_batch", tokens)
        assert outcome.code == 0, outcome.err
        losses.append([float(row["train/loss"]) for row in outcome.metrics(version=len(losses))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_goes_on_where_it_stopped(command_line: CommandLine, text_args: list[str]) -> None:
    args = [*text_args, "--model.lr_scheduler", "constant"]  # no shape that knows the last step
    whole = command_line("fit", *args).run()
    assert command_line("fit", *args, "--trainer.max_steps", 3, "--name", "half").code == 0
    config = whole.path.parents[1] / "half" / "version_0" / "config.yaml"
    again = command_line(
        *("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", 6), root=False
    )
    assert again.code == 0, again.err
    assert_same_weights(whole.checkpoint("last"), again.run("half").checkpoint("last"))


def test_a_curriculum_takes_the_easy_rows_first() -> None:
    difficulties = np.array([3.0, 1.0, 2.0, 1.0])
    sampler = StepSampler(np.ones(4), batch_size=2, num_steps=4, seed=0, difficulties=difficulties)
    steps = list(sampler)
    assert [sorted(difficulties[rows]) for rows in steps] == [[1, 1], [2, 3]] * 2
    sampler.start = 3  # a run that goes on
    assert list(sampler) == steps[3:]


@pytest.mark.parametrize("curriculum", ["length", "field"])
def test_a_curriculum_trains_on_documents_in_its_order(
    model_folder: Path, tmp_path: Path, curriculum: str
) -> None:
    """Not only on rows in the order of their means: packed first, each row held short and long ones."""
    rows = [{"text": text, "year": 1900 + i * 37 % 120} for i, text in enumerate(texts(900))]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = {"curriculum": curriculum, "split": "none", "max_length": 64}
    field = {"curriculum_field": "year"} if curriculum == "field" else {}
    data = prepared(tmp_path / "rows.jsonl", model_folder, tmp_path, **options, **field)
    packed, batch_size = data.rows("train"), 4
    num_steps = 2 * -(-len(packed) // batch_size)
    sampler = StepSampler(
        np.ones(len(packed)),
        batch_size=batch_size,
        num_steps=num_steps,
        seed=0,
        difficulties=data.difficulties(),
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    of_field = np.array([row["year"] for row in rows], dtype=float)
    lengths = np.array([len(ids) for ids in tokenizer([row["text"] for row in rows])["input_ids"]])
    sorted_by = of_field if curriculum == "field" else lengths
    documents, steps = packed["documents"][:], list(sampler)
    for epoch in (steps[: num_steps // 2], steps[num_steps // 2 :]):
        assert sorted(row for step in epoch for row in step) == list(range(len(packed)))
        met = [document for step in epoch for row in step for document in documents[row]]
        order = list(dict.fromkeys(met))
        assert sorted(order) == list(range(900))
        tenths = [part.mean() for part in np.array_split(sorted_by[order], 10)]
        ideal = [part.mean() for part in np.array_split(np.sort(sorted_by), 10)]
        assert tenths == sorted(tenths)
        assert np.abs(np.array(tenths) - ideal).max() < 0.02 * np.ptp(sorted_by)
    means = [np.mean([sorted_by[d] for row in s for d in documents[row]]) for s in steps]
    first_epoch = np.array(means[: num_steps // 2])
    assert (np.diff(first_epoch) >= -0.01 * np.ptp(sorted_by)).all()
    assert sum(map(len, packed["input_ids"])) / (64 * len(packed)) > 0.75


def test_documents_are_found_again(model_folder: Path, tmp_path: Path, text_file: Path) -> None:
    data = prepared(text_file, model_folder, tmp_path, split="none", max_length=64)
    first, second = data.locate_rows([0, 1])
    number = data.rows("train")[0]["documents"][0]
    assert f"{text_file}:{number + 1}" in first.split(", ")
    assert first != second


def test_the_same_document_is_on_one_side_only(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("\n".join(texts(150) * 2), "utf-8")
    data = prepared(
        tmp_path / "twice.txt",
        model_folder,
        tmp_path,
        split={"train": 0.5, "validation": 0.5},
        max_length=64,
    )
    sides = [
        {n % 150 for documents in data.rows(split)["documents"] for n in documents}
        for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 150
    assert any("repeat an earlier one" in note for note in data.prepared.facts["notes"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no text to train on"),
        (b"\n\n \n", "no text to train on"),
        (b"satu\n\xff\xfe\x00\x01", "t.txt:2: not UTF-8 (byte 0xff at 0)"),
        (b"satu dua tiga", "no documents are left for train, validation (of 1 documents)"),
    ],
)
def test_texts_that_are_none_are_refused(
    command_line: CommandLine,
    text_args: list[str],
    tmp_path: Path,
    content: bytes,
    told: str,
) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    refused = command_line("fit", *text_args, "--data.path", tmp_path / "t.txt")
    assert refused.code == 2
    assert told in refused.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data.path", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--data.max_length", "1"], "data.max_length: must be at least 2"),
        (["--data.max_length", "9999"], "more than the model's 256 positions"),
        (["--data.curriculum", "field"], "a field is given with curriculum field"),
        (["--data.curriculum", "field", "--data.curriculum_field", "year"], "'year' is no number"),
        (["--data.split", "{validation: 10}"], "give shares of the documents"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    command_line: CommandLine, text_args: list[str], flags: list[str], told: str
) -> None:
    refused = command_line("fit", *text_args, *flags)
    assert refused.code == 2
    assert told in refused.err


def test_one_giant_line_is_one_document(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "giant.txt").write_text(" ".join(WORDS * 40_000), "utf-8")  # 2 MB
    data = prepared(tmp_path / "giant.txt", model_folder, tmp_path, split="none", max_length=256)
    rows = data.rows("train")
    assert {n for documents in rows["documents"] for n in documents} == {0}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    one = len(tokenizer(" ".join(WORDS * 400))["input_ids"]) * 100
    assert sum(rows["num_supervised"]) == pytest.approx(one, rel=0.01)


def test_texts_can_be_looked_at(command_line: CommandLine, text_args: list[str]) -> None:
    looked = command_line("analyze", *text_args, "--show", 1)
    assert looked.code == 0, looked.err
    assert "documents of" in looked.out and "tokens per row" in looked.out
    run = command_line("fit", *text_args).run()
    explained = command_line("explain-step", run.path, 2)
    assert explained.code == 0, explained.err
    shown = [line for line in explained.out.splitlines() if line.startswith("row id ")]
    assert len(shown) == 4
    assert all("texts.txt:" in line for line in shown)
    again = command_line("analyze", "--config", run.path / "config.yaml", root=False)
    assert again.code == 0, again.err


def test_what_was_pretrained_can_be_used_as_its_end_says(
    command_line: CommandLine, text_args: list[str], tmp_path: Path
) -> None:
    outcome = command_line("fit", *text_args)
    assert outcome.code == 0, outcome.err
    run = outcome.run().path
    assert f"python -m fine_tune export {run}" in outcome.out
    exported = command_line("export", run, "--output", tmp_path / "exported")
    assert exported.code == 0, exported.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    said = command_line("chat", run, "--once", "ibu kota")
    assert said.code == 0, said.err
