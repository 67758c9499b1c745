"""One literal row per format, and what is refused."""

import json
from typing import Any

import pytest

from fine_tune.data.formats import FORMATS, detect_format
from fine_tune.data.templates import RowError, Templates, check_templates
from fine_tune.errors import UserError

NONE = Templates(None, None, None)


@pytest.mark.parametrize(
    ("columns", "templates", "expected"),
    [
        (["prompt", "completion"], NONE, "prompt_completion"),
        (["document", "summary"], Templates(None, "{document}", "{summary}"), "prompt_completion"),
        (["messages"], NONE, "messages"),
        (["conversations", "id"], NONE, "sharegpt"),
        (["instruction", "input", "output"], NONE, "alpaca"),
        (["text"], NONE, "text"),
        (["text", "messages"], Templates("text", None, None), "text"),
    ],
)
def test_formats_are_detected(columns: list[str], templates: Templates, expected: str) -> None:
    assert detect_format(columns, templates, "rows.jsonl") == expected


def test_an_unknown_format_lists_the_fields_seen_and_wanted() -> None:
    with pytest.raises(UserError, match=r"\['soal'\].*instruction\+output"):
        detect_format(["soal"], NONE, "rows.jsonl")


def test_templates_are_filled_from_any_field() -> None:
    templates = Templates(None, "Q: {q} {{x}}\n", " {a}")
    example = FORMATS["prompt_completion"]({"q": "1+1?", "a": 2}, templates)
    assert example == {"prompt": "Q: 1+1? {x}\n", "completion": " 2"}


def test_a_template_names_the_nearest_field() -> None:
    with pytest.raises(UserError, match="'sumary'.*did you mean 'summary'"):
        check_templates(Templates(None, "x", "{sumary}"), ["document", "summary"], "rows.jsonl")


def test_a_template_is_not_code() -> None:
    with pytest.raises(UserError, match="not a field name"):
        check_templates(Templates(None, "{a.__class__}", "{a}"), ["a"], "rows.jsonl")


def test_alpaca_uses_the_published_prompts() -> None:
    row = {"instruction": "Sebut warna", "input": "", "output": "merah"}
    example = FORMATS["alpaca"](row, NONE)
    assert example["prompt"].endswith("### Instruction:\nSebut warna\n\n### Response:\n")
    assert example["completion"] == "merah"


def test_sharegpt_becomes_messages() -> None:
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "halo"}]}
    assert FORMATS["sharegpt"](row, NONE)["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "halo"},
    ]


def test_tools_are_passed_through_without_the_nulls_of_the_table() -> None:
    schema = {"type": "function", "function": {"name": "cuaca", "parameters": None}}
    clean = [{"type": "function", "function": {"name": "cuaca"}}]
    for tools in ([schema], json.dumps(clean)):
        example = FORMATS["messages"]({**chat("user", "assistant"), "tools": tools}, NONE)
        assert example["tools"] == clean
    with pytest.raises(RowError, match="not JSON"):
        FORMATS["messages"]({**chat("user", "assistant"), "tools": "{"}, NONE)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        ("prompt_completion", {"prompt": "a", "completion": " "}, "completion is empty"),
        ("prompt_completion", {"prompt": "a"}, "'completion' is missing; the row has"),
        ("prompt_completion", {"prompt": None, "completion": "b"}, "'prompt' is null"),
        (
            "prompt_completion",
            {"prompt": ["a"], "completion": "b"},
            "must be a text or a number, got list",
        ),
        ("messages", chat("user"), "no assistant turn"),
        ("messages", chat("assistant", "user"), "follows nothing"),
        ("messages", chat("user", "user", "assistant"), "second user turn"),
        ("messages", chat("user", "system", "assistant"), "system turn"),
        ("messages", chat("user", "asistant"), "did you mean 'assistant'"),
        ("messages", {"messages": []}, "must be a list of turns"),
        ("text", {"text": ""}, "text is empty"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(
    format_name: Any, row: Any, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        FORMATS[format_name](row, NONE)
