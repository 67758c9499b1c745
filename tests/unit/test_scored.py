"""The answers of a row that a reward model scores, and rows that have none."""

from typing import Any

import pytest

from fine_tune.data.scored import scored_answers
from fine_tune.data.templates import RowError, Templates

NOTHING = Templates(None, None, None)


def test_a_list_of_answers_gives_a_list_of_scores() -> None:
    scored = scored_answers({"prompt": "2 + 2?", "completion": ["4", "5"]}, NOTHING)
    assert scored.is_list
    assert [example["completion"] for _, example in scored.examples] == ["4", "5"]


@pytest.mark.parametrize("messages", [{"role": "user"}, 7, True, "hello", []])
def test_messages_that_are_no_list_of_turns_are_told(messages: Any) -> None:
    with pytest.raises(RowError, match="messages"):
        scored_answers({"messages": messages}, NOTHING)


@pytest.mark.parametrize("name", ["completion", "prediction", "answer"])
def test_an_empty_list_of_answers_is_told(name: str) -> None:
    with pytest.raises(RowError, match=f"{name}: an empty list"):
        scored_answers({"prompt": "2 + 2?", name: []}, NOTHING)
