"""`make-preferences`: write pairs of a right and a worse answer to the questions that `make-qa` asks.

Sits before the straight line: what it writes is what `data/preferences.py` reads.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from fine_tune.commands.make_qa import (
    SPLITS,
    Row,
    facts_files,
    refuse_existing,
    say_written,
    split_rows,
)
from fine_tune.corpus.facts import digest, read_relations
from fine_tune.errors import UserError

ALMOST = (1, -1, 2, -2, 3, -3, 10, -10)  # what a wrong sum is off by
MOST_OFF_TOPIC = 20  # answers of other relations per question
KINDS = {
    "distractor": "the answer to another question of the same relation",
    "arithmetic": "a sum that is off by a little (1, 2, 3 or 10)",
    "length": "the right answer of a wrong length: in doubt, repeated, or cut off",
    "off_topic": "an answer to a question of another relation",
}


class Pair(NamedTuple):
    """A question with its right answer and a worse one, of one of the ``KINDS``."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    fact: str
    phrasing: str


def make_preferences(
    output: str,
    *,
    facts: str | list[str] | None = None,
    pairs: int = 1000,
    overwrite: bool = False,
) -> None:
    """Write pairs of a right and a worse answer for DPO, with a card that says how they were made.

    The same facts give the same bytes, and fewer pairs are the first ones of more. Questions stand in the file that
    `make-qa` puts them in, so the facts and phrasings held out there are held out here, too. The worse answer is a
    distractor of the same relation, a sum that is a little off, the right answer in a doubtful length, or off topic.

    Args:
        output: Folder for the five JSONL files and the card, `README.md`.
        facts: YAML file of relations or several, as for `make-qa`; by default the one shipped.
        pairs: Training pairs, at least 1. Every question gets one pair before any gets a second. Of the held-out
            files, each question gets one pair.
        overwrite: Whether to replace files that are already there.

    Raises:
        UserError: If a file to write is there and `overwrite` is false, more pairs are asked for
            than the facts give, or the facts cannot be read.
    """
    folder = Path(output)
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    refuse_existing([*paths.values(), folder / "README.md"], overwrite)
    written = split_pairs(read_relations(facts_files(facts)), pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        lines = [json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in written[split]]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(_card(written), encoding="utf-8", newline="\n")
    say_written(folder, written, ["README.md"])


def split_pairs(relations: dict[str, dict[str, Any]], num_train: int) -> dict[str, list[Pair]]:
    """Return the pairs of each split.

    Args:
        relations: As `read_relations` gives them.
        num_train: Training pairs.

    Raises:
        UserError: As `make_preferences` says.
    """
    if num_train < 1:
        raise UserError(f"--pairs: must be at least 1, got {num_train}")
    rows = split_rows(relations)
    answers = _answers(rows)
    sums = {name for name, relation in relations.items() if "facts" not in relation}
    made = {split: _pairs(of_split, answers, sums) for split, of_split in rows.items()}
    train = list(_first(made["train"], num_train))
    if len(train) < num_train:
        raise UserError(
            f"--pairs: {num_train:,} asked, but these facts give {len(train):,} different ones; "
            f"ask for at most that many, or extend --facts"
        )
    return {split: list(_first(made[split], len(rows[split]))) for split in SPLITS} | {
        "train": train
    }


def worse_answers(
    row: Row, answers: dict[str, list[str]], *, is_sum: bool
) -> Iterator[tuple[str, str]]:
    """Give the worse answers to a question and their kinds, the kinds by turns, none of them twice.

    Args:
        row: The question.
        answers: All answers of each relation.
        is_sum: Whether its answer is a number that a wrong sum comes near.
    """
    relation = row.fact.split(":")[0]
    others = _shuffled((a for a in answers[relation] if a != row.answer), row)
    foreign = (a for name, of_name in answers.items() if name != relation for a in of_name)
    near = [str(int(row.answer) + off) for off in ALMOST if is_sum and int(row.answer) + off >= 0]
    by_kind = {
        "distractor": [] if is_sum else others,
        "arithmetic": near,
        "length": _shuffled(_wrong_lengths(row.answer, near[:1] or others[:1]), row),
        "off_topic": _shuffled((a for a in foreign if a not in answers[relation]), row)[
            :MOST_OFF_TOPIC
        ],
    }
    kinds = [kind for kind in KINDS if by_kind[kind]]
    first = int(digest(row.fact, row.phrasing), 16) % len(kinds)  # not every question the same
    kinds = kinds[first:] + kinds[:first]
    given = {row.answer}
    for turn in zip_longest(*(by_kind[kind] for kind in kinds)):
        for kind, answer in zip(kinds, turn, strict=True):
            if answer is not None and answer not in given:
                given.add(answer)
                yield answer, kind


def _wrong_lengths(answer: str, other: list[str]) -> Iterator[str]:
    yield from (f"{answer}, atau mungkin {wrong}" for wrong in other)
    yield f"{answer} {answer} {answer}"
    last_word = answer.split()[-1]
    if len(last_word) >= 4:  # "rupee In": at the end of a word it might be right
        yield answer[: len(answer) - len(last_word) // 2]


def _pairs(
    rows: list[Row], answers: dict[str, list[str]], sums: set[str]
) -> list[Iterator[tuple[Row, str, str]]]:
    def of_row(row: Row) -> Iterator[tuple[Row, str, str]]:
        for answer, kind in worse_answers(row, answers, is_sum=row.fact.split(":")[0] in sums):
            yield row, answer, kind

    return [of_row(row) for row in rows]


def _first(of_rows: list[Iterator[tuple[Row, str, str]]], count: int) -> Iterator[Pair]:
    """Take pairs, one of each row by turns."""
    left = list(of_rows)
    while left and count > 0:
        going_on = []
        for of_row in left[:count]:
            found = next(of_row, None)
            if found is not None:
                row, rejected, kind = found
                yield Pair(row.question, row.answer, rejected, kind, row.fact, row.phrasing)
                going_on.append(of_row)
        count -= len(going_on)
        left = going_on


def _answers(rows: dict[str, list[Row]]) -> dict[str, list[str]]:
    answers: dict[str, set[str]] = {}
    for row in (row for of_split in rows.values() for row in of_split):
        answers.setdefault(row.fact.split(":")[0], set()).add(row.answer)
    return {relation: sorted(of_relation) for relation, of_relation in sorted(answers.items())}


def _shuffled(values: Any, row: Row) -> list[str]:
    return sorted(values, key=lambda value: digest(row.fact, row.phrasing, value))


def _card(written: dict[str, list[Pair]]) -> str:
    lines = [
        "# Pairs of a right and a worse answer, in Indonesian",
        "",
        "Written by `python -m fine_tune make-preferences` from a table of facts; no model and no person wrote or",
        "judged an answer. `chosen` is the table's answer. `rejected` is one of:",
        "",
        *(f"* `{kind}`: {text}" for kind, text in KINDS.items()),
        "",
        "Questions stand in the file that `make-qa` puts them in: a held-out file asks a known fact in a phrasing that",
        "training has only for other facts (`validation`, `test`), a new phrasing, or a new pair of operands.",
        "",
        f"| file | pairs | questions | {' | '.join(KINDS)} |",
        f"|---|---|---|{'---|' * len(KINDS)}",
    ]
    for split, pairs in written.items():
        kinds = Counter(pair.kind for pair in pairs)
        questions = len({pair.prompt for pair in pairs})
        counts = " | ".join(f"{kinds[kind]:,}" for kind in KINDS)
        lines.append(f"| {split}.jsonl | {len(pairs):,} | {questions:,} | {counts} |")
    return "\n".join([*lines, "", "The shipped facts and these pairs: Apache-2.0.", ""])
