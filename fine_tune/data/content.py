"""What a row itself says: its own words, without those that templates and system turns give to every row.

Rows are split and compared by them, so that another wording of the template moves nobody to another side.
"""

import string

from fine_tune.data.formats import FORMATS, Example, FormatName, Row, Templates, field_text


def own_words(row: Row, format_name: FormatName, templates: Templates) -> tuple[str, str]:
    """Return what a row asks and what it answers; plain text only answers.

    Raises:
        RowError: The row does not have what its format wants.
    """
    example: Example = FORMATS[format_name](row, templates)
    if format_name == "prompt_completion":
        asked, answered = (
            "\n".join(field_text(row, name) for name in _fields(key, template))
            for key, template in (
                ("prompt", templates.prompt),
                ("completion", templates.completion),
            )
        )
        return asked, answered
    if format_name == "alpaca":
        return f"{row['instruction']}\n{row.get('input') or ''}", str(row["output"])
    if "text" in example:
        return "", example["text"]
    turns = [turn for turn in example["messages"] if turn["role"] != "system"]
    said = [str(turn.get("content") or turn.get("tool_calls") or "") for turn in turns]
    first_answer = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return "\n".join(said[:first_answer]), "\n".join(said[first_answer:])


def _fields(key: str, template: str | None) -> list[str]:
    if template is None:
        return [key]
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
