"""Templates over the fields of a raw row, and what is wrong with a row that lacks them."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fine_tune.errors import UserError, nearest

Row = Mapping[str, Any]
PREFERENCE: Literal["preference"] = "preference"  # pairs: a data module of its own reads them


@dataclass(frozen=True)
class Templates:
    """How to read the rows of one source: a format name, and templates of the fields that formats name."""

    format: str | None
    prompt: str | None
    completion: str | None
    chosen: str | None = None
    rejected: str | None = None

    def given(self) -> dict[str, str]:
        """Return the templates that are given, by the field each stands for."""
        names = ("prompt", "completion", "chosen", "rejected")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


class RowError(Exception):
    """A row that does not have what its format wants; the caller adds the file and the row's number."""


class EmptyCompletion(RowError):
    """A row with nothing to learn: refused, or left out and counted, as ``data.empty_completions`` says."""


class SameAnswers(EmptyCompletion):
    """A pair whose chosen and rejected answers are the same."""


def check_templates(templates: Templates, columns: list[str], where: str) -> None:
    """Refuse templates that are malformed or name fields the rows do not have.

    Raises:
        UserError: One line per field that is missing, with the fields seen.
    """
    given = templates.given()
    pair = ("chosen", "rejected") if templates.format == PREFERENCE else ("prompt", "completion")
    for absent, other in (pair, pair[::-1]):
        if other in given and absent not in given and absent not in columns:
            raise UserError(
                f"{where}: data.{other} is given but data.{absent} is not, and no field has that name"
            )
    if templates.format == PREFERENCE and not {*given, *columns} >= {"chosen", "rejected"}:
        raise UserError(
            f"{where}: pairs have the fields 'chosen' and 'rejected' (and 'prompt'), the rows have {sorted(columns)}; "
            "or say how to read them with data.prompt, data.chosen and data.rejected"
        )
    problems = []
    for key, template in given.items():
        for name in template_fields(template, f"data.{key}"):
            if name not in columns:
                problems.append(
                    f"{where}: data.{key} wants the field '{name}', the rows have {sorted(columns)}"
                    f"{nearest(name, columns)}"
                )
    if problems:
        raise UserError(*problems)


def template_fields(template: str, key: str) -> list[str]:
    """Return the names of the fields in a template, which the setting ``key`` gave.

    Raises:
        UserError: It is malformed.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{key}: {error} in {template!r}; write a literal brace as {{{{ or }}}}"
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    bad = [
        name for name in names if not name or not name.replace("_", "a").replace("-", "a").isalnum()
    ]
    if bad:
        raise UserError(
            f"{key}: '{{{bad[0]}}}' is not a field name; a template holds names of fields only"
        )
    return names


def fill(template: str, row: Row) -> str:
    """Put a row's fields into a template."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(field_text(row, name))
    return "".join(parts)


def field_text(row: Row, name: str) -> str:
    """Return a field that must be a text or a number, as text."""
    if name not in row:
        raise RowError(
            f"the field '{name}' is missing; the row has {sorted(row)}{nearest(name, list(row))}"
        )
    value = row[name]
    if value is None:
        raise RowError(f"the field '{name}' is null; a text is wanted")
    is_number = isinstance(value, int | float) and str(value) not in ("nan", "inf", "-inf")
    if isinstance(value, bool) or not (isinstance(value, str) or is_number):
        raise RowError(f"the field '{name}' must be a text or a number, got {short(value)}")
    return str(value)


def short(value: Any) -> str:
    """Return a value's type and the beginning of what it is."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
