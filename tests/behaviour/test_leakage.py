"""Rows that stand in two splits: found by what they say, reported with their places, left out of train on request."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import TOKENIZER, write_rows

from fine_tune.corpus.shingles import jaccard
from fine_tune.data import SFTData
from fine_tune.errors import UserError

NOUNS = "padi gunung laut kota sungai hutan raja kapal pasar batu angin hujan tani guru kuda"
WORDS = NOUNS.split()


def rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [
        {"question": " ".join(rng.choice(WORDS, 20)), "answer": " ".join(rng.choice(WORDS, 8))}
        for _ in range(count)
    ]


def module(tmp_path: Path, train: Any, validation: Any, test: Any, **options: Any) -> SFTData:
    parts = {"train": train, "validation": validation, "test": test}
    paths = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()
    }
    settings: dict[str, Any] = {"prompt": "Pertanyaan: {question}", "completion": " {answer}"}
    return SFTData(
        path=paths,
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
        **{**settings, **options},
    )


def test_exact_and_near_rows_are_reported_with_their_places(tmp_path: Path) -> None:
    train, validation, test = rows(60, 0), rows(20, 1), rows(20, 2)
    validation[3] = train[10]
    words = train[20]["question"].split()
    test[5] = {**train[20], "question": " ".join(["perahu", *words[1:]])}
    leakage = module(tmp_path, train, validation, test).prepared.facts["audit"]["leakage"]
    assert leakage["between"]["train/validation"] == {
        "train": {"exact": 1, "near": 0},
        "validation": {"exact": 1, "near": 0},
    }
    assert leakage["between"]["train/test"]["test"] == {"exact": 0, "near": 1}
    assert leakage["between"]["validation/test"]["test"] == {"exact": 0, "near": 0}
    assert leakage["num_pairs"] == 2
    exact, near = leakage["pairs"]
    assert exact["first"] == {"split": "train", "source": str(tmp_path / "train.jsonl"), "row": 11}
    assert exact["second"]["row"] == 4
    assert (near["first"]["row"], near["second"]["row"]) == (21, 6)
    texts = [f"{row['question']}\n{row['answer']}" for row in (train[20], test[5])]
    assert near["similarity"] == pytest.approx(jaccard(*texts), abs=1e-4)


def test_what_every_row_shares_does_not_count(tmp_path: Path) -> None:
    long = (
        "Jawablah pertanyaan berikut ini dengan singkat padat dan jelas sesuai fakta yang ada " * 3
    )
    data = module(tmp_path, rows(40, 0), rows(10, 1), rows(10, 2), prompt=long + "{question}")
    assert data.prepared.facts["audit"]["leakage"]["num_pairs"] == 0


def test_leaked_rows_leave_train_on_request(tmp_path: Path) -> None:
    train, validation, test = rows(60, 0), rows(20, 1), rows(20, 2)
    validation[3], test[5] = train[10], train[20]
    data = module(tmp_path, train, validation, test, drop_leaked=True)
    plan = data.make_plan()
    assert plan.num_rows == {"train": 58, "validation": 20, "test": 20}
    assert {10, 20}.isdisjoint(data.rows("train")["row_id"][:])
    assert "2 rows left out of train: they stand in another split too" in plan.notes


def test_repeated_rows_are_counted_within_a_split(tmp_path: Path) -> None:
    train = rows(30, 0)
    data = module(tmp_path, [*train, *train[:4]], rows(10, 1), rows(10, 2))
    audit = data.prepared.facts["audit"]
    assert audit["repeated_rows"] == {"repeated": 4, "near": 0}
    assert audit["leakage"]["num_pairs"] == 0


def test_sums_that_differ_only_in_their_sign_are_different_rows(tmp_path: Path) -> None:
    train = [{"question": f"{i} + 0 =", "answer": str(i)} for i in range(10, 40)]
    minus = [{"question": f"{i} - 0 =", "answer": str(i)} for i in range(10, 40)]
    data = module(tmp_path, train, minus[:15], minus[15:])
    assert data.prepared.facts["audit"]["leakage"]["num_pairs"] == 0


def test_what_was_dropped_is_not_warned_of_nor_counted(tmp_path: Path) -> None:
    train, validation, test = rows(60, 0), rows(20, 1), rows(20, 2)
    validation[3] = train[10]
    train[11] = train[10]
    facts = module(tmp_path, train, validation, test, drop_leaked=True).prepared.facts
    assert facts["audit"]["rows"]["train"] == 58
    assert facts["audit"]["repeated_rows"] == {"repeated": 0, "near": 0}
    assert not [note for note in facts["notes"] if note.startswith("WARNING")]
    with pytest.raises(UserError, match="data.drop_leaked: no rows are left for train"):
        module(tmp_path, validation, validation, test, drop_leaked=True).prepare_data()
