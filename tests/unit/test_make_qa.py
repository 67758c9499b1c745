"""The quickstart's questions: same bytes each run, and no question that two files share."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from fine_tune.commands.make_qa import QUICKSTART, SPLITS, Row, make_qa, split_rows
from fine_tune.corpus.facts import read_relations, relation_facts
from fine_tune.errors import UserError

HELD_OUT_PAIRS = ("test", "validation")


def shipped(split: str) -> list[Row]:
    lines = (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines]


def write_facts(path: Path, relation: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"relations": {"capital": relation}}), encoding="utf-8")
    return path


def test_a_fresh_run_writes_the_shipped_bytes(tmp_path: Path) -> None:
    make_qa(str(tmp_path))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*"))
    assert len(written) == len(SPLITS) + 2
    for path in written:
        assert (tmp_path / path).read_bytes() == (QUICKSTART / path).read_bytes(), path


def test_existing_files_are_named_and_kept_unless_overwrite_is_set(tmp_path: Path) -> None:
    kept = tmp_path / "test.jsonl"
    kept.write_text("mine\n")
    with pytest.raises(UserError, match=r"test\.jsonl"):
        make_qa(str(tmp_path))
    assert kept.read_text() == "mine\n" and not (tmp_path / "train.jsonl").exists()
    make_qa(str(tmp_path), overwrite=True)
    assert kept.read_bytes() == (QUICKSTART / "test.jsonl").read_bytes()


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="261"):
        make_qa(str(tmp_path), tokenizer_vocab_size=260)


def test_no_question_is_asked_twice() -> None:
    questions = Counter(row.question for split in SPLITS for row in shipped(split))
    assert questions.most_common(1)[0][1] == 1


@pytest.mark.parametrize("split", HELD_OUT_PAIRS)
def test_a_held_out_pair_has_its_fact_and_its_phrasing_in_training(split: str) -> None:
    train = shipped("train")
    pairs = {(row.fact, row.phrasing) for row in train}
    facts, phrasings = {row.fact for row in train}, {row.phrasing for row in train}
    for row in shipped(split):
        assert (row.fact, row.phrasing) not in pairs
        assert row.fact in facts and row.phrasing in phrasings


def test_new_phrasings_and_new_operands_are_never_trained() -> None:
    train = shipped("train")
    facts, phrasings = {row.fact for row in train}, {row.phrasing for row in train}
    for row in shipped("test_new_phrasings"):
        assert row.fact in facts and row.phrasing not in phrasings
    for row in shipped("test_new_operands"):
        assert row.fact not in facts and row.phrasing in phrasings


def test_sizes_and_first_validation_rows() -> None:
    assert len(shipped("test")) >= 250
    assert 100 <= len(shipped("validation")) <= 150
    first = [(row.question, row.answer) for row in shipped("validation")[:2]]
    assert first == [("Ibu kota Indonesia adalah", "Jakarta"), ("10 - 5 =", "5")]
    assert len({row.fact.split(":")[0] for row in shipped("validation")[:8]}) == 8


def test_arithmetic_answers_are_right() -> None:
    facts = {(row.fact, row.answer) for split in SPLITS for row in shipped(split)}
    sums = [(fact.split(":")[1].split(), answer) for fact, answer in facts if "tion:" in fact]
    assert len(sums) >= 150
    for (a, operator, b), answer in sums:
        assert int(answer) == (int(a) + int(b) if operator == "+" else int(a) - int(b))


def test_differences_below_zero_are_left_out() -> None:
    facts = relation_facts("subtraction", {"operator": "-", "max_operand": 1})
    assert [fact.id for fact in facts] == [
        "subtraction:0 - 0",
        "subtraction:1 - 0",
        "subtraction:1 - 1",
    ]


def test_a_new_fact_moves_no_other_row(tmp_path: Path) -> None:
    phrasings = {f"p{i}": f"{i} {{subject}}?" for i in range(8)}
    facts = {f"land {i}": f"city {i}" for i in range(20)}
    relation = {"phrasings": phrasings, "new_phrasings": {"n": "n {subject}?"}, "facts": facts}
    before = split_rows(read_relations([write_facts(tmp_path / "before.yaml", relation)]))
    extended = {**relation, "facts": {"land new": "city new", **facts}}
    after = split_rows(read_relations([write_facts(tmp_path / "after.yaml", extended)]))
    for split in SPLITS:
        assert [row for row in after[split] if row.answer != "city new"] == before[split]


def test_a_lone_fact_is_trained_in_every_phrasing(tmp_path: Path) -> None:
    phrasings = {f"p{i}": f"{i} {{subject}}?" for i in range(50)}
    relation = {"phrasings": phrasings, "new_phrasings": {}, "facts": {"land": "city"}}
    rows = split_rows(read_relations([write_facts(tmp_path / "facts.yaml", relation)]))
    assert {split: len(rows[split]) for split in SPLITS if rows[split]} == {"train": 50}


def test_two_phrasings_with_one_text_are_refused(tmp_path: Path) -> None:
    phrasings = {"a": "Capital of {subject}?", "b": "Capital of {subject}?"}
    relation = {"phrasings": phrasings, "new_phrasings": {}, "facts": {"land": "city"}}
    with pytest.raises(UserError, match=r"Capital of land\?.*capital:b.*capital:a"):
        split_rows(read_relations([write_facts(tmp_path / "facts.yaml", relation)]))


def test_relations_that_cannot_be_asked_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    power = {"phrasings": {"a": "{a} ^ {b} ="}, "operator": "^", "max_operand": 3}
    content = {"relations": {"capital": {"facts": {"land": "city"}}, "power": power}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_relations([path])
    assert [problem.split()[2] for problem in caught.value.problems] == ["capital", "power"]
    with pytest.raises(UserError, match="no_such"):
        read_relations([tmp_path / "no_such.yaml"])


def test_a_misspelt_placeholder_names_its_phrasing(tmp_path: Path) -> None:
    relation = {"phrasings": {"a": "{subjek}?"}, "new_phrasings": {}, "facts": {"land": "city"}}
    with pytest.raises(UserError, match=r"capital:a .*\{subject\}"):
        split_rows(read_relations([write_facts(tmp_path / "facts.yaml", relation)]))


def test_the_tokenizer_round_trips_and_masks_all_but_assistant_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "tokenizer")
    text = "  é漢字\n 10 - 5 ="
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("12") == ["1", "2"]
    assert tokenizer.bos_token is None and tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "3 + 4 ="}, {"role": "assistant", "content": "7"}]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    answered = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, said in answered if said]) == "7<eos>"
