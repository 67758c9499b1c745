"""The chain from a run back to the texts its tokenizer was trained on; a deleted link is named."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from harness import CommandLine, Outcome

from fine_tune.runs.lineage import (
    ancestry,
    lines_of,
    origin_of,
    parent_of,
    read_tokenizer_origin,
    to_share,
)

SMALL = "{model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"satu {i} dua {i % 7} tiga" for i in range(200)), "utf-8")
    return file


@pytest.fixture
def chain(command_line: CommandLine, texts: Path, tmp_path: Path, rows_file: Path) -> Outcome:
    """Tokenizer, pretraining on its texts, fine-tuning on rows, both of two steps."""
    tokenizer = tmp_path / "tokenizer"
    made = command_line(
        "train-tokenizer",
        *("--input", f"[{texts}]", "--output", tokenizer, "--vocab_size", 270),
    )
    assert made.code == 0, made.err
    brief = ["--trainer.max_steps", 2, "--data.batch_size", 4, "--generations.rows", 0]
    first = command_line(
        *("fit", "--name", "first", "--model", "Pretrain", "--model.from_config", SMALL),
        *("--model.tokenizer", tokenizer, "--data", "TextData", "--data.path", texts),
        *("--data.max_length", 32, *brief),
    )
    assert first.code == 0, first.err
    second = command_line(
        *("fit", "--name", "second", "--model", "SFT"),
        *("--model.model_name_or_path", first.run("first").path),
        *("--data", "SFTData", "--data.path", rows_file, *brief),
        *("--data.prompt", "{question}", "--data.completion", " {answer}"),
    )
    assert second.code == 0, second.err
    return second


def shown(command_line: CommandLine, outcome: Outcome, name: str = "second") -> list[str]:
    told = command_line("lineage", outcome.run(name).path)
    assert told.code == 0, told.err
    return told.out.splitlines()


def sha256(file: Path) -> str:
    return f"SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def test_the_chain_goes_back_to_the_hashes_of_the_data(
    command_line: CommandLine, chain: Outcome, texts: Path, rows_file: Path
) -> None:
    lines = shown(command_line, chain)
    assert lines[0] == "second/version_0: SFT"
    assert lines[1] == f"  data {rows_file} {sha256(rows_file)}"
    best = chain.run("first").read()["best"]
    assert f"  first/version_0: Pretrain, weights of {best}" in lines
    assert f"    data {texts} {sha256(texts)}" in lines
    (tokenizer,) = [line for line in lines if line.startswith("    tokenizer")]
    assert tokenizer.endswith(f": bpe of 270 from {texts.name} {sha256(texts)}")


def test_a_deleted_parent_is_named_with_what_its_child_kept_of_it(
    command_line: CommandLine, chain: Outcome
) -> None:
    before, folder = shown(command_line, chain), chain.run("first").path
    shutil.rmtree(folder.parent)
    after = shown(command_line, chain)
    (changed,) = [line for line in after if line not in before]
    assert changed.endswith(f" (gone: {folder})")
    assert len(after) == len(before)


def test_a_parent_that_is_another_run_now_or_has_no_checkpoint_or_is_damaged_is_told(
    command_line: CommandLine, chain: Outcome
) -> None:
    run = chain.run("first")
    best = run.checkpoint("best")
    assert best is not None
    identity = json.loads((best / "run_identity.json").read_text("utf-8"))
    (best / "run_identity.json").write_text(json.dumps(identity | {"seed_everything": 7}))
    assert any("(another run: " in line for line in shown(command_line, chain))
    shutil.rmtree(run.checkpoints)
    assert any("(checkpoint gone: " in line for line in shown(command_line, chain))
    before = shown(command_line, chain)
    (run.path / "run.json").write_text("{")
    assert any("(damaged: " in line for line in shown(command_line, chain))
    assert len(shown(command_line, chain)) == len(before)  # with what its child kept


def test_what_a_child_keeps_is_of_the_checkpoint_it_came_from(chain: Outcome) -> None:
    (known,) = chain.run("second").read()["parents"]
    run = chain.run("first")
    run.update({"identity": {"model": "another.module"}})
    assert parent_of("weights", run.path) == known
    (run.path / "run.json").unlink()
    alone = parent_of("weights", run.checkpoints / known["checkpoint"])  # a copied checkpoint
    assert alone is not None and alone["identity_hash"] == known["identity_hash"]
    assert alone["origin"]["files"] == known["origin"]["files"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"run": ".."}', "null"])
def test_a_damaged_origin_stops_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "fine_tune_origin.json").write_text(content)
    (tmp_path / "tokenizer_origin.json").write_text(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_tokenizer_origin(str(tmp_path)) is None
    found = parent_of("weights", tmp_path)
    record = {"parents": [found] if found else [1, {"run": 3, "origin": [2]}], "identity": [3]}
    told = [lines_of(a) for _, a in ancestry(tmp_path, record).chain()]
    assert told[0][0].endswith("nothing is known of it")
    parent = {"run": str(tmp_path / "a" / "b" / "c"), "origin": origin_of(record)}
    assert to_share(parent, tmp_path)["origin"]["parents"] is not None


def test_another_tokenizer_in_the_folder_is_not_taken_for_the_one_that_was_trained(
    chain: Outcome, tmp_path: Path
) -> None:
    assert chain.run("first").read()["tokenizer_origin"]["vocab_size"] == 270
    folder = tmp_path / "tokenizer"
    assert read_tokenizer_origin(str(folder)) is not None
    (folder / "tokenizer.json").write_text("{}")
    assert read_tokenizer_origin(str(folder)) is None


def test_a_written_folder_hands_the_chain_on(
    command_line: CommandLine,
    chain: Outcome,
    tmp_path: Path,
    rows_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    target = tmp_path / "exported"
    assert command_line("export", chain.run("second").path, "--output", target).code == 0
    shared = (target / "fine_tune_origin.json").read_text("utf-8")
    assert rows_file.name in shared and str(tmp_path) not in shared  # no place of this machine
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model"
    assert command_line("export", chain.run("second").path, "--output", elsewhere).code == 0
    shared = (elsewhere / "fine_tune_origin.json").read_text("utf-8")
    assert '"run": "second/version_0"' in shared and tmp_path.name not in shared
    third = command_line(
        *("fit", "--name", "third", "--model", "SFT", "--model.model_name_or_path", target),
        *("--data", "SFTData", "--data.path", rows_file, "--data.batch_size", 4),
        *("--data.prompt", "{question}", "--data.completion", " {answer}"),
        *("--trainer.max_steps", 1, "--generations.rows", 0, "--report", "en"),
    )
    assert third.code == 0, third.err
    lines = shown(command_line, third, "third")
    assert [line.strip().split(":")[0] for line in lines if "/version_0: " in line] == [
        "third/version_0",
        "second/version_0",
        "first/version_0",
    ]
    page = (third.run("third").path / "report.md").read_text("utf-8")
    assert "second/version_0: SFT" in page and "first/version_0: Pretrain" in page


def test_a_run_that_is_not_there_is_a_mistake_of_the_user(command_line: CommandLine) -> None:
    told = command_line("lineage", "nothing")
    assert told.code == 2
    assert "run: no run 'nothing'" in told.err
