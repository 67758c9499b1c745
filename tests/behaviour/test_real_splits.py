"""Splits and leakage on real rows: prompts stay together, planted near-duplicates are found, nobody changes sides."""

import json
import os
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import TOKENIZER, write_rows

from fine_tune.data import SFTData

DATA = Path(os.environ.get("FINE_TUNE_DATA", "/nowhere"))
CASES: dict[str, tuple[str, str]] = {
    "gsm8k_preferences": ("{prompt}\n", "{chosen}"),
    "facqa_id_train": ("{context}\nPertanyaan: {question}\nJawaban:", " {answer}"),
}
Row = dict[str, Any]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA.is_dir(),
        reason="real rows are not shipped: their licences differ; FINE_TUNE_DATA names a folder of them",
    ),
]


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def prepared(path: Any, name: str, tmp_path: Path, **options: Any) -> SFTData:
    prompt, completion = CASES[name]
    settings = {"prompt": prompt, "completion": completion, "tokenizer": str(TOKENIZER), **options}
    module = SFTData(path=path, cache_dir=str(tmp_path / "cache"), **settings)
    module.setup("test")
    return module


def sides(module: SFTData, rows: list[Row]) -> dict[str, str]:
    return {
        json.dumps(rows[i], sort_keys=True): split
        for split in module.plan.num_rows
        for i in module.rows(split)["row_id"][:]
    }


@pytest.mark.parametrize("name", CASES)
def test_repeated_prompts_stay_together_and_nobody_changes_sides(name: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    rows = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    added, old = rows[: len(rows) // 11], rows[len(rows) // 11 :]
    before = sides(prepared(str(write_rows(tmp_path / "old.jsonl", old)), name, tmp_path), old)
    more = [*added, *old]
    random.Random(1).shuffle(more)
    after = sides(prepared(str(write_rows(tmp_path / "more.jsonl", more)), name, tmp_path), more)
    assert len(before) == len(old) and len(after) == len(more)
    assert all(after[row] == side for row, side in before.items())
    asked = ("prompt",) if "preferences" in name else ("context", "question")
    by_prompt: dict[str, set[str]] = {}
    for text, side in after.items():
        row = json.loads(text)
        by_prompt.setdefault("\n".join(row[field] for field in asked), set()).add(side)
    assert all(len(of_prompt) == 1 for of_prompt in by_prompt.values())
    repeated = len(more) - len(by_prompt)
    print(
        f"\n{name}: {len(old)} rows, {len(added)} added, {repeated} with a repeated prompt, 0 moved"
    )
    assert repeated > 100 or "preferences" not in name


@pytest.mark.parametrize("name", CASES)
def test_planted_near_duplicates_are_found(name: str, tmp_path: Path) -> None:
    rows, draw = rows_of(name), random.Random(0)
    draw.shuffle(rows)
    train, held_out = rows[len(rows) // 5 :], rows[: len(rows) // 5]
    planted = draw.sample(range(len(train)), len(rows) // 20)
    fields = ("prompt", "chosen") if "preferences" in name else ("context", "question", "answer")
    copies = [with_one_word_changed(train[i], fields[0], draw) for i in planted]
    parts = {"train": train, "validation": [*held_out[::2], *copies], "test": held_out[1::2]}
    path = {split: str(write_rows(tmp_path / f"{split}.jsonl", of)) for split, of in parts.items()}
    leakage = prepared(path, name, tmp_path).prepared.facts["audit"]["leakage"]
    assert leakage["num_pairs"] == len(leakage["pairs"])
    assert leakage["num_capped"] == 0

    def text(place: Row) -> str:
        row = parts[place["split"]][place["row"] - 1]
        return "\n".join(row[field] for field in fields)

    correct = sum(
        exact_jaccard(text(p["first"]), text(p["second"])) >= 0.7 for p in leakage["pairs"]
    )
    found = {
        (p["first"]["row"] - 1, p["second"]["row"] - 1 - len(held_out[::2]))
        for p in leakage["pairs"]
        if p["first"]["split"] == "train" and p["second"]["split"] == "validation"
    }
    recall = sum((i, copy) in found for copy, i in enumerate(planted)) / len(planted)
    precision = correct / len(leakage["pairs"])
    print(
        f"\n{name}: {len(planted)} planted in {len(rows)} rows, recall {recall:.4f}, "
        f"precision {precision:.4f} of {len(leakage['pairs'])} pairs"
    )
    assert recall >= 0.95
    assert precision >= 0.95


def exact_jaccard(first: str, second: str) -> float:
    """Of the sets of word pairs, without the project's own code; their texts have no symbols that decide."""

    def pairs(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\d+(?:[.,]\d+)+|[^\W_]+|[-#$%&*+/<=>@^`|~]", text.lower())
        return set(pairwise(found))

    one, other = pairs(first), pairs(second)
    return len(one & other) / len(one | other)


def with_one_word_changed(row: Row, field: str, draw: random.Random) -> Row:
    words = row[field].split()
    at = draw.randrange(len(words))
    change = draw.choice(([], ["lain"], [words[at], "lain"]))  # left out, replaced, put in
    return {**row, field: " ".join([*words[:at], *change, *words[at + 1 :]])}
