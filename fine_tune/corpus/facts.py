"""Tables of facts and the ways to ask for them: what ``make-qa`` and ``make-preferences`` write rows from."""

import csv
import hashlib
import io
import itertools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fine_tune.errors import UserError

OPERATORS = {"+": operator.add, "-": operator.sub, "×": operator.mul}
NEW_OPERANDS = 80  # per mille of the operand pairs that are never trained on
TABLES = ("phrasings", "new_phrasings", "statements", "facts")


class Fact(NamedTuple):
    """One fact: its id, the words that fill a phrasing, its answer, whether training sees it."""

    id: str
    slots: dict[str, Any]
    answer: str
    is_trained: bool


def read_relations(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Read files of relations; a later one adds to a relation of an earlier one, or replaces its entries.

    Raises:
        UserError: One is missing, or a relation lacks what it needs.
    """
    relations: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, relation in _read(file).items():
            known = relations.setdefault(name, {})
            for key, value in relation.items():
                both = isinstance(value, dict) and isinstance(known.get(key), dict)
                known[key] = {**known[key], **value} if both else value
    problems = []
    for name, relation in relations.items():
        where = f"{', '.join(map(str, files))}: relation {name}"
        if not relation.get("phrasings"):
            problems.append(f"{where} needs `phrasings`, a table of name: text.")
        has_operands = relation.get("operator") in OPERATORS and "max_operand" in relation
        if not relation.get("facts") and not has_operands:
            problems.append(
                f"{where} needs `facts`, or `max_operand` and an `operator` of {', '.join(OPERATORS)}."
            )
    if problems:
        raise UserError(*problems)
    return relations


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--facts: cannot read {file}: {error}") from error
    relations = content.get("relations") if isinstance(content, dict) else None
    if not isinstance(relations, dict) or not relations:
        raise UserError(f"--facts: {file} has no `relations`; see the shipped facts.yaml.")
    problems = [
        f"{file}: relation {name} needs `{key}`, a table of name: text."
        for name, relation in relations.items()
        for key in TABLES
        if not isinstance(relation, dict) or not isinstance(relation.get(key, {}), dict)
    ]
    problems += [
        f"{file}: relation {name}: no colon in a name" for name in relations if ":" in str(name)
    ]
    if problems:
        raise UserError(*problems)
    for name, relation in relations.items():
        if "table" in relation:
            relation["facts"] = {
                **_facts_of(file, name, relation.pop("table")),
                **relation.get("facts", {}),
            }
    return relations


def _facts_of(file: Path, name: str, table: Any) -> dict[str, str]:
    """Make facts of the rows of a CSV file that lies beside the file of relations."""
    where = f"{file}: relation {name}: table"
    keys = {"path", "subject", "answer"}
    if (
        not isinstance(table, dict)
        or table.keys() != keys
        or not all(isinstance(v, str) for v in table.values())
    ):
        raise UserError(
            f"{where} needs `path`, `subject` and `answer`, the two made of {{columns}}."
        )
    try:
        text = (file.parent / table["path"]).read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        broken = [i for i, row in enumerate(rows, 1) if None in row or None in row.values()]
        if broken:
            raise UserError(
                f"{where}: {table['path']}: row {broken[0]} has not the columns of the head"
            )
        facts = {
            table["subject"].format(**row).strip(): table["answer"].format(**row).strip()
            for row in rows
        }
    except (OSError, ValueError, csv.Error, LookupError, AttributeError) as error:
        raise UserError(f"{where}: {table['path']}: {type(error).__name__} {error}") from error
    if len(facts) < len(rows):
        raise UserError(f"{where}: {table['path']}: two rows have the same subject")
    return facts


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
            is_trained = per_mille("operands", *sorted((str(a), str(b)))) >= NEW_OPERANDS
            fact_id = f"{name}:{a} {relation['operator']} {b}"
            yield Fact(fact_id, {"a": a, "b": b}, str(result), is_trained)


def filled(template: str, fact: Fact, phrasing: str, **more: str) -> str:
    """Put a fact's words into a phrasing.

    Raises:
        UserError: The phrasing asks for others.
    """
    slots = {**fact.slots, **more}
    try:
        return template.format(**slots)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{slot}}}" for slot in slots)
        raise UserError(
            f"phrasing {phrasing} ({template!r}) has something else than {known} in braces."
        ) from error


def per_mille(*parts: str) -> int:
    """Return a number from 0 to 999 that follows from the words alone."""
    return int(digest(*parts), 16) % 1000


def digest(*parts: str) -> str:
    """Hash words, in hexadecimal."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
