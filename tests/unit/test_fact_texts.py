"""Facts of several files, and the texts that tell them: the same each time, and no question among them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import REPOSITORY

from fine_tune.commands.make_qa import SPLITS, make_qa, split_rows
from fine_tune.corpus.fact_texts import fact_texts
from fine_tune.corpus.facts import read_relations
from fine_tune.errors import UserError
from fine_tune.runs.answers import counts_of, is_another

FILES = [
    REPOSITORY / "fine_tune" / "quickstart" / "facts.yaml",
    REPOSITORY / "configs" / "masa" / "facts.yaml",
]


def write(file: Path, **relations: Any) -> Path:
    file.write_text(yaml.safe_dump({"relations": relations}), encoding="utf-8")
    return file


def test_a_later_file_adds_to_a_relation_and_replaces_its_entries(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.yaml",
        capital={"phrasings": {"a": "A {subject}"}, "facts": {"land": "city", "sea": "port"}},
    )
    second = write(
        tmp_path / "b.yaml",
        capital={"phrasings": {"b": "B {subject}"}, "facts": {"sea": "harbour"}},
        other={"phrasings": {"a": "O {subject}"}, "facts": {"x": "y"}},
    )
    relations = read_relations([first, second])
    assert list(relations) == ["capital", "other"]
    assert relations["capital"]["phrasings"] == {"a": "A {subject}", "b": "B {subject}"}
    assert relations["capital"]["facts"] == {"land": "city", "sea": "harbour"}


def test_facts_come_from_a_table_beside_the_file(tmp_path: Path) -> None:
    text = '\ufeffnumber,year,subject\r\n1,1974,"Perkawinan\nSipil"\r\n40,1999,Pers\r\n'  # as Excel writes it
    (tmp_path / "laws.csv").write_bytes(text.encode("utf-8"))
    table = {"path": "laws.csv", "subject": "{number}/{year}", "answer": "{subject}"}
    relation = {"phrasings": {"a": "{subject}?"}, "table": table}
    relations = read_relations([write(tmp_path / "a.yaml", law=relation)])
    assert relations["law"]["facts"] == {"1/1974": "Perkawinan\nSipil", "40/1999": "Pers"}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"path": "laws.csv"}, "needs `path`, `subject` and `answer`"),
        ({"path": "none.csv", "subject": "{a}", "answer": "{a}"}, "none.csv"),
        ({"path": "laws.csv", "subject": "{nothing}", "answer": "{a}"}, "nothing"),
        ({"path": "laws.csv", "subject": "{b}", "answer": "{a}"}, "two rows have the same subject"),
        ({"path": "laws.csv", "subject": "{a.x}", "answer": "{a}"}, "AttributeError"),
        ({"path": "laws.csv", "subject": 3, "answer": "{a}"}, "needs `path`, `subject` and"),
        ({"path": "short.csv", "subject": "{a}", "answer": "{b}"}, "row 2 has not the columns"),
    ],
)
def test_a_table_that_gives_no_facts_is_refused(
    tmp_path: Path, table: dict[str, str], told: str
) -> None:
    (tmp_path / "laws.csv").write_text("a,b\n1,x\n2,x\n")
    (tmp_path / "short.csv").write_text("a,b\n1,x\n2\n")
    file = write(tmp_path / "a.yaml", law={"phrasings": {"a": "{subject}?"}, "table": table})
    with pytest.raises(UserError, match=told):
        read_relations([file])


def test_texts_tell_trained_facts_alone_and_hold_no_question() -> None:
    relations = read_relations(FILES)
    texts = list(fact_texts(relations, 700))
    assert texts == list(fact_texts(relations, 700))
    assert len(set(texts)) == 700
    rows = split_rows(relations)
    together = "\n".join(texts)
    asked = [row.question for split in SPLITS[1:] for row in rows[split]]
    assert not [question for question in asked if question in together]
    for row in rows["test_new_operands"]:
        if row.phrasing == "addition:sama_dengan":
            a, _, b, *_ = row.question.split()
            assert f"Bila {a} dijumlahkan dengan {b}," not in together
    assert "Jakarta" in together and "10 November" in together


def test_the_shipped_facts_are_as_many_as_the_pipeline_says() -> None:
    rows = split_rows(read_relations(FILES))
    assert 10_000 <= sum(len(of_split) for of_split in rows.values()) <= 50_000
    assert len(rows["test"]) >= 300
    shipped = split_rows(read_relations(FILES[:1]))
    operands = ("addition", "subtraction")  # more of them: some come and none moves
    for split in SPLITS:
        for row in shipped[split]:
            assert row in rows[split] or row.fact.split(":")[0] in operands, row


def test_a_statement_that_holds_a_question_is_refused(tmp_path: Path) -> None:
    relation = {
        "phrasings": {"a": "Ibu kota {subject} adalah"},
        "facts": {"Nepal": "Kathmandu"},
        "statements": {"s": "Ibu kota {subject} adalah {answer}."},
    }
    with pytest.raises(UserError, match="the statement s .* holds the question capital:a"):
        list(fact_texts(read_relations([write(tmp_path / "a.yaml", capital=relation)]), 1))
    del relation["statements"]
    with pytest.raises(UserError, match="no relation has `statements`"):
        make_qa(
            str(tmp_path / "o"),
            facts=str(write(tmp_path / "b.yaml", capital=relation)),
            corpus_texts=3,
        )
    assert not (tmp_path / "o").exists()


def test_texts_without_a_fact_to_tell_are_refused(tmp_path: Path) -> None:
    sums = {"phrasings": {"a": "{a}+{b}"}, "operator": "+", "max_operand": -1}
    sums["statements"] = {"s": "{a} und {b}: {answer}"}
    with pytest.raises(UserError, match="have no facts to tell"):
        list(fact_texts(read_relations([write(tmp_path / "a.yaml", sums=sums)]), 3))
    with pytest.raises(UserError, match="corpus_texts: must be at least 0"):
        make_qa(str(tmp_path / "o"), corpus_texts=-1)
    named = write(tmp_path / "b.yaml", **{"s:t": sums})
    with pytest.raises(UserError, match="no colon in a name"):
        read_relations([named])


def test_a_statement_that_holds_a_question_of_another_relation_is_refused(tmp_path: Path) -> None:
    told = {"phrasings": {"a": "Q {subject}"}, "facts": {"x": "y"}}
    told["statements"] = {"s": "Tell {subject} {answer}"}
    asked = {"phrasings": {"b": "Tell {subject}"}, "facts": {"x": "z"}}
    relations = read_relations([write(tmp_path / "a.yaml", q=told, r=asked)])
    with pytest.raises(UserError, match="holds the question r:b"):
        list(fact_texts(relations, 1))


def test_a_wrong_answer_that_another_row_expects_is_told_apart() -> None:
    answers = [
        {"expected": "Jakarta", "answer": "Jakarta", "exact_match": True},
        {"expected": "Dili", "answer": "Jakarta", "exact_match": False},
        {"expected": "Manila", "answer": "Manil", "exact_match": False},
        {"expected": "Dili", "answer": "Dili", "exact_match": True},
    ]
    assert is_another(answers) == [False, True, False, False]
    assert counts_of(answers) == {"test/exact_match": 2, "test/another_answer": 1}
    assert is_another([{"stage": "test"}, *answers]) == [
        False,
        False,
        True,
        False,
        False,
    ]  # damaged
    assert counts_of(answers[:3]) == {"test/exact_match": 1}  # nothing in common
