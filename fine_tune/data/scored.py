"""A raw row -> the answers in it that a reward model scores."""

from dataclasses import dataclass
from typing import Any

from fine_tune.data.formats import Example
from fine_tune.data.preferences import preference
from fine_tune.data.prompts import asked
from fine_tune.data.templates import (
    PREFERENCE,
    Row,
    RowError,
    Templates,
    field_text,
    fill,
    template_fields,
)

ANSWERS = ("completion", "prediction", "answer")  # in this order


@dataclass(frozen=True)
class Scored:
    """Whole examples by the field that takes their score; ``is_list``: the scores of one field."""

    examples: list[tuple[str, Example]]
    is_list: bool = False


def scored_answers(row: Row, templates: Templates) -> Scored:
    """Find the answers of a row.

    A pair gives ``reward_chosen`` and ``reward_rejected``. A conversation that ends with an assistant turn, or a prompt
    with a ``completion``, a ``prediction`` or an ``answer``, gives ``reward``, a list of them for a list of answers.

    Raises:
        RowError: There is no answer to score.
    """
    if _has(row, "chosen", templates.chosen) and _has(row, "rejected", templates.rejected):
        pair = preference(row, templates)
        return Scored(
            [("reward_chosen", pair["chosen"]), ("reward_rejected", pair["rejected"])],
        )
    if row.get("messages") is not None and templates.prompt is None:
        turns = row["messages"]
        if not isinstance(turns, list):
            raise RowError(f"messages: must be a list of turns, got {type(turns).__name__}")
        if not turns or not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
            return _behind(row, templates, asked(row, "messages", templates))
        before = asked(row, "messages", templates)
        return Scored([("reward", _answered(before, str(turns[-1].get("content") or "")))])
    before = asked(row, PREFERENCE, templates)
    return _behind(row, templates, before)


def _behind(row: Row, templates: Templates, before: Example) -> Scored:
    if _has(row, "chosen", templates.chosen):
        name = "chosen"
    else:
        name = next((name for name in ANSWERS if row.get(name) is not None), "")
    if not name:
        raise RowError(
            "there is no answer to score: give chosen and rejected, messages that end with an assistant turn, or a "
            f"prompt with {', '.join(ANSWERS)}; the row has {sorted(row)}"
        )
    if name == "chosen" and templates.chosen is not None:
        return Scored([("reward", _answered(before, fill(templates.chosen, row)))])
    answers: list[Any] = row[name] if isinstance(row[name], list) else [row[name]]
    if not answers:
        raise RowError(f"{name}: an empty list has no answer to score")
    texts = [_as_trained(field_text({name: answer}, name), row, templates) for answer in answers]
    return Scored(
        [("reward", _answered(before, text)) for text in texts], isinstance(row[name], list)
    )


def _as_trained(answer: str, row: Row, templates: Templates) -> str:
    """Write an answer as the run's template writes one, like ``" {chosen}"``."""
    template = templates.chosen
    if template is None or len(names := template_fields(template, "data.chosen")) != 1:
        return answer
    return fill(template, {**row, names[0]: answer})


def _answered(before: Example, answer: str) -> Example:
    if "messages" in before:
        turns = [*before["messages"], {"role": "assistant", "content": answer}]
        return {"messages": turns, "tools": before.get("tools")}
    return {"prompt": before["prompt"], "completion": answer}


def _has(row: Row, name: str, template: str | None) -> bool:
    if template is None:
        return row.get(name) is not None
    return all(row.get(field) is not None for field in template_fields(template, f"data.{name}"))
