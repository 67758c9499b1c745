"""What a row itself says: its own words, without those that a template gives to every row.

Rows are split and compared by them, so that another wording of the template moves nobody to another side.
"""

import string
from typing import Any, NamedTuple

from fine_tune.data.formats import FORMATS, Example
from fine_tune.data.preferences import preference
from fine_tune.data.templates import PREFERENCE, Row, Templates, field_text


class OwnWords(NamedTuple):
    """What a row's system turn says, what it asks and what it answers; plain text only answers."""

    system: str
    asked: str
    answered: str

    @property
    def prompt(self) -> str:
        """What keeps rows together: all that comes before the answer, or the answer where nothing does."""
        said = [part for part in (self.system, self.asked) if part.strip()]
        return "\n".join(said) or self.answered


def own_words(row: Row, format_name: str, templates: Templates) -> OwnWords:
    """Return what a row itself says.

    Raises:
        RowError: The row does not have what its format wants.
    """
    if format_name == PREFERENCE:
        return _pair_words(row, templates)
    example: Example = FORMATS[format_name](row, templates)
    if format_name == "prompt_completion":
        asked, answered = (
            "\n".join(field_text(row, name) for name in _fields(key, template))
            for key, template in (
                ("prompt", templates.prompt),
                ("completion", templates.completion),
            )
        )
        return OwnWords("", asked, answered)
    if format_name == "alpaca":
        return OwnWords("", f"{row['instruction']}\n{row.get('input') or ''}", str(row["output"]))
    if "text" in example:
        return OwnWords("", "", example["text"])
    return _conversation_words(example["messages"])


def _conversation_words(turns: list[dict[str, Any]]) -> OwnWords:
    said = [str(turn.get("content") or turn.get("tool_calls") or "") for turn in turns]
    first = 1 if turns[0]["role"] == "system" else 0
    answer = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return OwnWords(
        "\n".join(said[:first]), "\n".join(said[first:answer]), "\n".join(said[answer:])
    )


def _pair_words(row: Row, templates: Templates) -> OwnWords:
    pair = preference(row, templates)
    examples = (pair["chosen"], pair["rejected"])
    if "messages" in pair["chosen"]:
        chosen, rejected = (_conversation_words(example["messages"]) for example in examples)
        return chosen._replace(answered=f"{chosen.answered}\n{rejected.answered}")
    asked = pair["chosen"]["prompt"]
    if templates.prompt is not None:
        asked = "\n".join(field_text(row, name) for name in _fields("prompt", templates.prompt))
    answers = [
        "\n".join(field_text(row, name) for name in _fields("", template))
        if template is not None
        else example["completion"]
        for example, template in zip(examples, (templates.chosen, templates.rejected), strict=True)
    ]
    return OwnWords("", asked, "\n".join(answers))


def _fields(key: str, template: str | None) -> list[str]:
    if template is None:
        return [key]
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
