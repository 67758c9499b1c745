"""The quickstart's pairs: same bytes each run, a worse answer that is worse, and the held-out facts of `make-qa`."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fine_tune.__main__ import main
from fine_tune.commands.make_preferences import KINDS, Pair, make_preferences, split_pairs
from fine_tune.commands.make_qa import QUICKSTART, SPLITS, Row, split_rows
from fine_tune.corpus.facts import read_relations
from fine_tune.errors import UserError

FACTS = QUICKSTART / "facts.yaml"
PREFERENCES = QUICKSTART / "preferences"


def shipped(split: str) -> list[Pair]:
    lines = (PREFERENCES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Pair(**json.loads(line)) for line in lines]


def questions(split: str) -> dict[str, Row]:
    return {row.question: row for row in split_rows(read_relations([FACTS]))[split]}


def test_a_fresh_run_writes_the_shipped_bytes(tmp_path: Path) -> None:
    make_preferences(str(tmp_path))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(["README.md", *(f"{split}.jsonl" for split in SPLITS)])
    for name in written:
        assert (tmp_path / name).read_bytes() == (PREFERENCES / name).read_bytes(), name


@pytest.mark.parametrize("split", SPLITS)
def test_a_pair_asks_a_question_of_its_own_file_and_prefers_the_right_answer(split: str) -> None:
    rows, pairs = questions(split), shipped(split)
    assert pairs
    for pair in pairs:
        row = rows[pair.prompt]
        assert (pair.chosen, pair.fact, pair.phrasing) == (row.answer, row.fact, row.phrasing)
        assert pair.rejected.strip() and pair.rejected != pair.chosen
    assert len({(pair.prompt, pair.rejected) for pair in pairs}) == len(pairs)


def test_the_four_kinds_are_what_the_card_says() -> None:
    by_kind: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for pair in shipped("train"):
        by_kind[pair.kind].append(pair)
    assert all(len(pairs) >= 50 for pairs in by_kind.values())
    answers: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in questions(split).values():
            answers.setdefault(row.fact.split(":")[0], set()).add(row.answer)
    for pair in by_kind["distractor"]:
        assert pair.rejected in answers[pair.fact.split(":")[0]]
    for pair in by_kind["arithmetic"]:
        assert 1 <= abs(int(pair.rejected) - int(pair.chosen)) <= 10
    for pair in by_kind["length"]:
        assert pair.rejected.startswith(pair.chosen) or pair.chosen.startswith(pair.rejected)
        ends_inside_a_word = pair.chosen[len(pair.rejected) :][:1].isalnum()
        assert pair.rejected.startswith(pair.chosen) or ends_inside_a_word
        assert pair.rejected not in answers[pair.fact.split(":")[0]]
    for pair in by_kind["off_topic"]:
        assert pair.rejected not in answers[pair.fact.split(":")[0]]


def test_fewer_pairs_are_the_first_of_more_and_every_question_comes_before_a_second_turn() -> None:
    few, many = split_pairs(read_relations([FACTS]), 50), split_pairs(read_relations([FACTS]), 5000)
    assert many["train"][:50] == few["train"] and len(few["train"]) == 50
    num_questions = len(questions("train"))
    assert len({pair.prompt for pair in many["train"][:num_questions]}) == num_questions
    assert max(Counter(pair.prompt for pair in many["train"]).values()) == 2
    assert [len(many[s]) for s in SPLITS[1:]] == [len(questions(s)) for s in SPLITS[1:]]


def test_more_pairs_than_the_facts_give_are_refused_with_their_number() -> None:
    with pytest.raises(UserError, match=r"--pairs: 10,000,000 asked, but these facts give 1\d\d,"):
        split_pairs(read_relations([FACTS]), 10_000_000)
    with pytest.raises(UserError, match="at least 1"):
        split_pairs(read_relations([FACTS]), 0)


def test_existing_files_are_kept_unless_overwrite_is_set(tmp_path: Path) -> None:
    kept = tmp_path / "README.md"
    kept.write_text("mine\n")
    with pytest.raises(UserError, match=r"README\.md"):
        make_preferences(str(tmp_path))
    assert kept.read_text() == "mine\n" and not (tmp_path / "train.jsonl").exists()
    make_preferences(str(tmp_path), overwrite=True)
    assert kept.read_bytes() == (PREFERENCES / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("verb", "told"), [("make-preferences", "README.md"), ("make-qa", "a tok")]
)
def test_what_was_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, told: str
) -> None:
    assert main([verb, "--output", str(tmp_path / "made")]) == 0
    train = len((tmp_path / "made" / "train.jsonl").read_text("utf-8").splitlines())
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'made'}: {train:,} in train.jsonl, " in out
    assert told in out
