"""A raw row -> a conversation, or a prompt with its completion, or a text: the first step of the straight line.

Each format is one function ``(row, source) -> Example``; the example says which of the three it is by its keys.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from fine_tune.data.templates import (
    EmptyCompletion,
    Row,
    RowError,
    Templates,
    field_text,
    fill,
    short,
)
from fine_tune.errors import UserError, nearest

FormatName = Literal["prompt_completion", "messages", "alpaca", "sharegpt", "text"]


class Example(TypedDict, total=False):
    """Either ``prompt`` and ``completion``, or ``messages`` (and ``tools``), or ``text``."""

    prompt: str
    completion: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    text: str


def detect_format(columns: list[str], templates: Templates, where: str) -> str:
    """Name the format of a source from its templates and columns.

    Raises:
        UserError: Nothing fits, with the fields seen and the fields each format wants.
    """
    if templates.format is not None:
        return templates.format
    seen = set(columns)
    if (
        templates.prompt is not None
        or templates.completion is not None
        or {"prompt", "completion"} <= seen
    ):
        return "prompt_completion"
    if "messages" in seen:
        return "messages"
    if "conversations" in seen:
        return "sharegpt"
    if {"instruction", "output"} <= seen:
        return "alpaca"
    if "text" in seen:
        return "text"
    raise UserError(
        f"{where}: no known format has the fields {sorted(seen)}; say how to read them with data.prompt and "
        "data.completion, like prompt: 'Question: {question}' and completion: ' {answer}', or use the fields of a "
        "format: prompt+completion, messages, conversations (sharegpt), instruction+output (alpaca), text"
    )


def prompt_completion(row: Row, templates: Templates) -> Example:
    """``prompt`` and ``completion`` as fields, or as templates over any fields."""
    prompt = (
        fill(templates.prompt, row) if templates.prompt is not None else field_text(row, "prompt")
    )
    completion = (
        fill(templates.completion, row)
        if templates.completion is not None
        else field_text(row, "completion")
    )
    if not completion.strip():
        raise EmptyCompletion("the completion is empty")
    return {"prompt": prompt, "completion": completion}


def messages(row: Row, _: Templates) -> Example:
    """``messages: [{role, content}, ...]`` and optionally ``tools``, for the tokenizer's chat template."""
    turns = _list(row, "messages")
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise RowError(
                f"messages[{i}] must be an object with 'role' and 'content', got {short(turn)}"
            )
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise RowError(
                f"messages[{i}].content must be a text, got {short(turn.get('content'))}"
            )
        if not isinstance(turn.get("tool_calls"), list | None):
            raise RowError(
                f"messages[{i}].tool_calls must be a list, got {short(turn['tool_calls'])}"
            )
    turns = _without_nulls(turns)
    check_roles([str(turn["role"]) for turn in turns])
    _refuse_empty_answers(turns)
    return {"messages": turns, "tools": _tools(row.get("tools"))}


def alpaca(row: Row, _: Templates) -> Example:
    """``instruction``, optional ``input``, ``output``: Stanford Alpaca's published prompts."""
    instruction, output = field_text(row, "instruction"), field_text(row, "output")
    given = field_text(row, "input") if row.get("input") is not None else ""
    if not output.strip():
        raise EmptyCompletion("the output is empty")
    if given:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return {"prompt": prompt, "completion": output}


def sharegpt(row: Row, _: Templates) -> Example:
    """``conversations: [{from: human|gpt|system, value}, ...]``."""
    roles = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    turns = []
    for i, turn in enumerate(_list(row, "conversations")):
        if (
            not isinstance(turn, Mapping)
            or turn.get("from") not in list(roles)
            or not isinstance(turn.get("value"), str)
        ):
            raise RowError(
                f"conversations[{i}] must have 'from' in {sorted(roles)} and a text 'value': {short(turn)}"
            )
        turns.append({"role": roles[turn["from"]], "content": turn["value"]})
    check_roles([turn["role"] for turn in turns])
    _refuse_empty_answers(turns)
    return {"messages": turns, "tools": None}


def text(row: Row, _: Templates) -> Example:
    """``text``: every token is learned."""
    value = field_text(row, "text")
    if not value.strip():
        raise EmptyCompletion("the text is empty")
    return {"text": value}


FORMATS: dict[str, Callable[[Row, Templates], Example]] = {
    "prompt_completion": prompt_completion,
    "messages": messages,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "text": text,
}


def check_roles(roles: list[str]) -> None:
    """Refuse a conversation whose roles are unknown, out of order, or without an assistant turn."""
    allowed = ("system", "user", "assistant", "tool")
    for i, role in enumerate(roles):
        if role not in allowed:
            raise RowError(
                f"messages[{i}] has role '{role}'; allowed: {', '.join(allowed)}{nearest(role, list(allowed))}"
            )
        if role == "system" and i > 0:
            raise RowError(f"messages[{i}] is a system turn; only the first may be")
        if role == "assistant" and (i == 0 or roles[i - 1] not in ("user", "tool")):
            raise RowError(
                f"messages[{i}] is an assistant turn that follows {roles[i - 1] if i else 'nothing'}"
            )
        if role == "user" and i > 0 and roles[i - 1] == "user":
            raise RowError(f"messages[{i}] is the second user turn in a row")
    if "assistant" not in roles:
        raise RowError("no assistant turn, so nothing to learn")


def _refuse_empty_answers(turns: list[dict[str, Any]]) -> None:
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not any(str(a.get("content") or "").strip() or a.get("tool_calls") for a in answers):
        raise EmptyCompletion("every assistant turn is empty")


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise RowError(
            f"the field '{name}' must be a list of turns, got {short(value)}; the row has {sorted(row)}"
        )
    return value


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):  # a common way to keep schemas of different shape in one column
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"the field 'tools' is a text but not JSON: {error}") from error
    if value is not None and not isinstance(value, list):
        raise RowError(f"the field 'tools' must be a list of JSON schemas, got {short(value)}")
    return _without_nulls(value) or None


def _without_nulls(value: Any) -> Any:
    """Leave out the nulls that a table fills in where objects of one column have different keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
