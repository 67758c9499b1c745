"""A raw row -> what a model is asked: the prompt half of ``formats.py`` and ``encode.py``. No answer is needed."""

import csv
import json
from pathlib import Path
from typing import Any

from fine_tune.data.encode import Encoder, Segment
from fine_tune.data.formats import FORMATS, Example, detect_format
from fine_tune.data.preferences import common_prompt
from fine_tune.data.sources import Source
from fine_tune.data.templates import PREFERENCE, Row, RowError, Templates, field_text, fill
from fine_tune.errors import UserError

STANDS_FOR_AN_ANSWER = "?"
CHAT_FORMATS = ("messages", "sharegpt")
USER_TURN = "user_turn"  # a prompt, for a model that was trained on conversations


def prompt_format(columns: list[str], templates: Templates, where: str) -> str:
    """Name the format that rows are asked in, from the run's templates and the fields they have.

    Raises:
        UserError: Nothing fits, with the fields seen.
    """
    if templates.format is not None:
        return templates.format
    if templates.prompt is not None or templates.completion is not None:
        return "prompt_completion"
    by_field = {
        "messages": "messages",
        "conversations": "sharegpt",
        "instruction": "alpaca",
        "prompt": "prompt_completion",
        "text": "text",
    }
    for name, format_name in by_field.items():
        if name in columns:
            return format_name
    raise UserError(
        f"{where}: no known prompt has the fields {sorted(columns)}; say how to read them with data.prompt, like "
        "'Question: {question}', or use the fields of a format: prompt, messages, conversations (sharegpt), "
        "instruction (alpaca), text"
    )


def trained_format(source: Source) -> str | None:
    """Name the format a run's rows were read in, by its settings or by its first training row where that is at hand.

    Pairs of conversations count as ``messages``.
    """
    templates = source.templates
    given = templates.prompt is not None or templates.completion is not None
    if templates.format == PREFERENCE:
        first = {} if given else _first_row(source)
        in_turns = any(isinstance(first.get(name), list) for name in ("prompt", "chosen"))
        return "messages" if in_turns else PREFERENCE
    try:
        fields = [] if given or templates.format is not None else list(_first_row(source))
        return detect_format(fields, templates, source.label)
    except UserError:
        return None


def asked(row: Row, format_name: str, templates: Templates) -> Example:
    """Return what a row asks: a ``prompt``, a ``text`` to go on with, or ``messages`` that an answer follows.

    Of a conversation, an assistant turn at its end is left out: it is what is asked for.

    Raises:
        RowError: A field of the prompt is missing or of the wrong kind.
    """
    if format_name == USER_TURN:
        said = [{"role": "user", "content": _prompt(row)}]
        return asked({"messages": said, "tools": row.get("tools")}, "messages", templates)
    if format_name == PREFERENCE:
        return _asked_of_pair(row, templates)
    if format_name in CHAT_FORMATS:
        field, last = ("messages", {"role": "assistant", "content": STANDS_FOR_AN_ANSWER})
        if format_name == "sharegpt":
            field, last = ("conversations", {"from": "gpt", "value": STANDS_FOR_AN_ANSWER})
        given = row.get(field)
        if isinstance(given, list):
            row = {**row, field: [*_without_answer(given), last]}
        example = FORMATS[format_name](row, templates)
        return {"messages": example["messages"][:-1], "tools": example.get("tools")}
    if format_name == "prompt_completion":
        template = templates.prompt
        return {"prompt": fill(template, row) if template is not None else _prompt(row)}
    if format_name == "alpaca":
        row = {**row, "output": STANDS_FOR_AN_ANSWER}
        return {"prompt": FORMATS["alpaca"](row, templates)["prompt"]}
    return {"text": FORMATS["text"](row, templates)["text"]}


def asked_segments(encoder: Encoder, example: Example) -> list[Segment]:
    """Lay out what is asked as segments of text, up to where the answer begins.

    Raises:
        RowError: The chat template refuses the conversation.
        UserError: There is no chat template.
    """
    if "messages" not in example:
        return [Segment(example["text"] if "text" in example else example["prompt"], False)]
    return [Segment(chat_text(encoder.tokenizer, example["messages"], example.get("tools")), False)]


def chat_text(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """Write a conversation by the tokenizer's template, up to where the assistant begins to speak."""
    if not tokenizer.chat_template:
        raise UserError(
            "data.format: the rows are conversations but the tokenizer has no chat template; use an instruct "
            "model's tokenizer (--model.tokenizer) or rows with a prompt"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise through jinja with errors of their own
        raise RowError(
            f"the chat template refuses the conversation: {str(error).splitlines()[0]}"
        ) from error
    return str(text)


def stop_ids(encoder: Encoder, *, chat: bool) -> set[int]:
    """Return the tokens that training puts behind an answer: EOS, and of a chat template its end of turn."""
    stops = {int(encoder.tokenizer.eos_token_id)}
    if not chat:
        return stops
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, labels = next(
            encoder.ids_and_labels([encoder.segments({"messages": turns})], chat=True)
        )
    except (RowError, UserError):  # a template of other conversations
        return stops
    learned = [token for token, label in zip(ids, labels, strict=True) if label == token]
    special = set(encoder.tokenizer.all_special_ids)
    return stops | ({learned[-1]} & special)


def _asked_of_pair(row: Row, templates: Templates) -> Example:
    if templates.prompt is not None:
        return {"prompt": fill(templates.prompt, row)}
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, list):
        return asked({"messages": prompt, "tools": row.get("tools")}, "messages", templates)
    if isinstance(chosen, list):
        before: list[Any] = [] if prompt is None else [{"role": "user", "content": prompt}]
        turns = [*before, *chosen]
        return asked({"messages": turns, "tools": row.get("tools")}, "messages", templates)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        return {"prompt": common_prompt(chosen, rejected)}
    return {"prompt": _prompt(row)}


def _prompt(row: Row) -> str:
    return field_text(row, "prompt")


def _without_answer(turns: list[Any]) -> list[Any]:
    last = turns[-1] if turns else None
    answered = isinstance(last, dict) and (
        last.get("role") == "assistant" or last.get("from") in ("gpt", "assistant")
    )
    return turns[:-1] if answered else turns


def _first_row(source: Source) -> dict[str, Any]:
    path = source.path if isinstance(source.path, str) else next(iter(source.path.values()))
    try:
        with open(path, encoding="utf-8-sig") as handle:
            if Path(path).suffix == ".txt":
                return {"text": ""}
            line = next(handle)
            if Path(path).suffix == ".csv":
                return dict.fromkeys(next(csv.reader([line])))
            return dict(json.loads(line))
    except (OSError, ValueError, StopIteration, TypeError):
        return {}
