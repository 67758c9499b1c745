"""What ``analyze`` tells of pairs: cut, equal, empty and contradictory ones are counted, and refused where wrong."""

from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine, write_rows


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": f"Berapa {i}?", "chosen": f" {i}", "rejected": f" {i + 1} mungkin"}
        for i in range(40)
    ]


def args(dpo_args: list[str], tmp_path: Path, pairs: list[dict[str, Any]]) -> list[str]:
    write_rows(tmp_path / "pairs.jsonl", pairs)
    return [*dpo_args, "--data.split", "none"]


def test_empty_equal_and_contradictory_pairs_are_counted(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path, pairs: list[dict[str, Any]]
) -> None:
    turned = {"prompt": "Berapa 7?", "chosen": " 8 mungkin", "rejected": " 7"}
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    empty = {"prompt": "a", "chosen": "b", "rejected": " "}
    given = args(dpo_args, tmp_path, [*pairs, turned, equal, equal, empty])
    outcome = command_line("analyze", *given)
    assert outcome.code == 0, outcome.err
    counted = "1 pairs with an empty answer, 2 with twice the same (in all splits)"
    assert f"left out     {counted}" in outcome.out
    assert "turned round by another pair: 2" in outcome.out
    assert "WARNING: 2 training pairs are turned round by another one of the same prompt" in (
        outcome.out
    )
    assert "empty or same        3 rows: fit refuses them" in outcome.out


def test_cut_answers_are_counted_and_refused_where_nothing_is_left_to_prefer(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path, pairs: list[dict[str, Any]]
) -> None:
    long = {"prompt": "a b", "chosen": " satu" * 30, "rejected": " dua" * 30}
    short = {"prompt": "a b", "chosen": " satu" * 30, "rejected": " tiga"}
    cut = ["--data.max_length", "20", "--data.truncation", "completion_right"]
    outcome = command_line("analyze", *args(dpo_args, tmp_path, [*pairs, long, short]), *cut)
    assert outcome.code == 0, outcome.err
    assert "cut          one answer of 1 pairs, both of 1;" in outcome.out
    assert "WARNING: of 1 training pairs one answer is cut, of 1 both" in outcome.out
    same = {"prompt": "a b", "chosen": " satu" * 30, "rejected": " satu" * 29 + " dua"}
    refused = command_line("fit", *args(dpo_args, tmp_path, [*pairs, same]), *cut)
    assert refused.code == 2
    assert "pairs.jsonl:41: within data.max_length 20 both answers are cut, and what is left" in (
        refused.err
    )
