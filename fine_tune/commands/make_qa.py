"""`make-qa`: write the quickstart's questions and its tokenizer from a table of facts.

Sits before the straight line: what it writes is what `data/formats.py` reads.
"""

import hashlib
import itertools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fine_tune.corpus import tokenizers
from fine_tune.errors import UserError

QUICKSTART = Path(__file__).parents[1] / "quickstart"
OPERATORS = {"+": operator.add, "-": operator.sub, "×": operator.mul}
SPLITS = ("train", "validation", "test", "test_new_phrasings", "test_new_operands")
# Per mille of the (fact, phrasing) pairs, except NEW_OPERANDS: of the operand pairs.
TEST, VALIDATION, NEW_PHRASINGS, NEW_OPERANDS, NEW_OPERANDS_ASKED = 100, 35, 300, 80, 500


class Row(NamedTuple):
    """One question with its answer; the pair (fact, phrasing) is its identity."""

    question: str
    answer: str
    fact: str
    phrasing: str


class Fact(NamedTuple):
    """One fact: its id, the words that fill a phrasing, its answer, whether training sees it."""

    id: str
    slots: dict[str, Any]
    answer: str
    is_trained: bool


def make_qa(
    output: str,
    *,
    facts: str | None = None,
    tokenizer_vocab_size: int = 1500,
    overwrite: bool = False,
) -> None:
    """Write train, validation and test questions in Indonesian, and a tokenizer fitted to them.

    The same facts give the same bytes. `test.jsonl` and `validation.jsonl` ask facts and use
    phrasings that `train.jsonl` also has, but never that fact in that phrasing.
    `test_new_phrasings.jsonl` asks in phrasings that are never trained on,
    `test_new_operands.jsonl` about operand pairs that are never trained on.

    Args:
        output: Folder for the five JSONL files and the folder `tokenizer`.
        facts: YAML file of relations with their facts and phrasings; by default the one shipped
            in `fine_tune/quickstart/facts.yaml`. Copy and extend it to ask about something else:
            rows that were there before stay in the file they were in.
        tokenizer_vocab_size: Largest number of tokens, special tokens included; at least 261 (256
            bytes and 5 special tokens). Fewer tokens: longer rows, a smaller embedding.
        overwrite: Whether to replace files that are already there.

    Raises:
        UserError: If a file to write is there and `overwrite` is false, the vocabulary is too
            small, or the facts cannot be read or ask one question twice.
    """
    least = tokenizers.least_tokens("bpe", tokenizers.SPECIAL_TOKENS)
    if tokenizer_vocab_size < least:
        raise UserError(
            f"--tokenizer_vocab_size: {tokenizer_vocab_size} is too small; the 256 bytes and the "
            f"special tokens need {least}."
        )
    folder = Path(output)
    data_paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    tokenizer_paths = [
        folder / "tokenizer" / n for n in ("tokenizer.json", "tokenizer_config.json")
    ]
    refuse_existing([*data_paths.values(), *tokenizer_paths], overwrite)
    rows = split_rows(Path(facts or QUICKSTART / "facts.yaml"))
    texts = (f"{row.question} {row.answer}" for row in rows["train"])
    tokenizer = tokenizers.train(texts, "bpe", tokenizer_vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in data_paths.items():
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows[split]]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    tokenizers.save(tokenizer, folder / "tokenizer")


def refuse_existing(files: list[Path], overwrite: bool) -> None:
    """Refuse to write over files that are there.

    Raises:
        UserError: Names them, unless they may be replaced.
    """
    existing = [str(path) for path in files if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"These files exist already: {', '.join(existing)}.",
            "Choose another --output, or replace them with --overwrite true.",
        )


def split_rows(facts: Path) -> dict[str, list[Row]]:
    """Ask every fact in every phrasing and say which file each question belongs to.

    Args:
        facts: YAML file of relations, see the one in `fine_tune/quickstart`.

    Returns:
        The rows of each split, which follows from the hash of the ids of fact and phrasing.
        Relations take turns, so that the first rows of a file are varied; within a relation a
        `pinned` row comes first and the others in the order of their hash.

    Raises:
        UserError: If `facts` is missing or is no such file, or two rows ask the same question.
    """
    by_relation = [_relation_rows(*item) for item in read_relations(facts).items()]
    by_question: dict[str, Row] = {}
    for row in (row for rows in by_relation for split in SPLITS for row in rows[split]):
        other = by_question.setdefault(row.question, row)
        if other is not row:
            raise UserError(
                f"{facts} asks {row.question!r} twice: for the fact {other.fact} phrased as "
                f"{other.phrasing}, and for {row.fact} phrased as {row.phrasing}. "
                "Change one of the two phrasings."
            )
    return {
        split: [
            rows[split][turn]
            for turn in range(max(len(rows[split]) for rows in by_relation))
            for rows in by_relation
            if turn < len(rows[split])
        ]
        for split in SPLITS
    }


def read_relations(facts: Path) -> dict[str, dict[str, Any]]:
    """Read a file of relations.

    Raises:
        UserError: It is missing, or a relation lacks what it needs.
    """
    try:
        content = yaml.safe_load(facts.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--facts: cannot read {facts}: {error}") from error
    relations = content.get("relations") if isinstance(content, dict) else None
    if not isinstance(relations, dict) or not relations:
        raise UserError(f"--facts: {facts} has no `relations`; see the shipped facts.yaml.")
    problems = []
    for name, relation in relations.items():
        tables = [relation.get(key, {}) for key in ("phrasings", "new_phrasings", "facts")]
        if not relation.get("phrasings") or not all(isinstance(table, dict) for table in tables):
            problems.append(f"{facts}: relation {name} needs `phrasings`, a table of name: text.")
        has_operands = relation.get("operator") in OPERATORS and "max_operand" in relation
        if not relation.get("facts") and not has_operands:
            problems.append(
                f"{facts}: relation {name} needs `facts`, or `max_operand` and an `operator` of "
                f"{', '.join(OPERATORS)}."
            )
    if problems:
        raise UserError(*problems)
    return relations


def _relation_rows(name: str, relation: dict[str, Any]) -> dict[str, list[Row]]:
    pinned = tuple(f"{name}:{part}" for part in relation.get("pinned", {}).values())
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for fact in relation_facts(name, relation):
        for kind in ("phrasings", "new_phrasings"):
            for key, template in relation.get(kind, {}).items():
                question = _fill(template, fact, f"{name}:{key}")
                row = Row(question, fact.answer, fact.id, f"{name}:{key}")
                is_pinned = (row.fact, row.phrasing) == pinned
                split = "validation" if is_pinned else _split(row, fact.is_trained, kind)
                if split is not None:
                    rows[split].append(row)
    # A fact or phrasing that only held-out rows have goes back to training (small tables only).
    facts_trained = {row.fact for row in rows["train"]}
    phrasings_trained = {row.phrasing for row in rows["train"]}
    for split in ("validation", "test"):
        for row in list(rows[split]):
            if row.fact not in facts_trained or row.phrasing not in phrasings_trained:
                rows[split].remove(row)
                rows["train"].append(row)
    for split in SPLITS:
        rows[split].sort(key=lambda row: ((row.fact, row.phrasing) != pinned, _digest(*row[2:])))
    return rows


def relation_facts(name: str, relation: dict[str, Any]) -> Iterator[Fact]:
    """List the facts of one relation: its table, or the sums its operator makes.

    Args:
        name: The relation's name; the facts' ids begin with it.
        relation: With `facts`, a table from subject to answer; otherwise with an `operator`
            and a `max_operand`. Differences below zero are left out.

    Returns:
        The facts. An operand pair is trained on with every operator or with none.
    """
    for subject, answer in relation.get("facts", {}).items():
        yield Fact(f"{name}:{subject}", {"subject": subject}, str(answer), is_trained=True)
    if "facts" in relation:
        return
    operands = range(relation["max_operand"] + 1)
    for a, b in itertools.product(operands, operands):
        result = OPERATORS[relation["operator"]](a, b)
        if result >= 0:
            is_trained = _per_mille("operands", *sorted((str(a), str(b)))) >= NEW_OPERANDS
            fact_id = f"{name}:{a} {relation['operator']} {b}"
            yield Fact(fact_id, {"a": a, "b": b}, str(result), is_trained)


def _fill(template: str, fact: Fact, phrasing: str) -> str:
    try:
        return template.format(**fact.slots)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{slot}}}" for slot in fact.slots)
        raise UserError(
            f"phrasing {phrasing} ({template!r}) has something else than {known} in braces."
        ) from error


def _split(row: Row, is_trained: bool, kind: str) -> str | None:
    place = _per_mille(row.fact, row.phrasing)
    if kind == "new_phrasings":
        return "test_new_phrasings" if is_trained and place < NEW_PHRASINGS else None
    if not is_trained:
        return "test_new_operands" if place < NEW_OPERANDS_ASKED else None
    if place < TEST:
        return "test"
    return "validation" if place < TEST + VALIDATION else "train"


def _per_mille(*parts: str) -> int:
    return int(_digest(*parts), 16) % 1000


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
