"""A row of preferences -> one pair: the prompt once, then both answers; nothing of an answer is lost in silence."""

import math
from typing import Any

import pytest

from fine_tune.data.content import own_words
from fine_tune.data.encode import EncodedRow
from fine_tune.data.preferences import common_prompt, encode_pair, preference
from fine_tune.data.templates import EmptyCompletion, RowError, Templates
from fine_tune.losses import IGNORE_INDEX as NO

PLAIN = Templates("preference", None, None)


def sequence(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return prompt + answer, [NO] * len(prompt) + answer


def test_the_prompt_is_kept_once() -> None:
    pair = encode_pair(sequence([1, 2], [3, 9]), sequence([1, 2], [4, 5, 9]), 8, "drop")
    assert pair == EncodedRow(
        [1, 2, 3, 9, 4, 5, 9], [NO, NO, 3, 9, 4, 5, 9], num_prompt=2, num_chosen=2
    )


def test_what_both_answers_begin_with_belongs_to_the_answers() -> None:
    pair = encode_pair(sequence([1], [3, 4, 9]), sequence([1], [3, 5, 9]), 8, "drop")
    assert pair is not None
    assert (pair.num_prompt, pair.num_chosen) == (1, 3)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", None),
        ("prompt_left", EncodedRow([0, 3, 5, 9, 6, 9], [NO, NO, 5, 9, 6, 9], 2, 0, 2, 2)),
        (
            "completion_right",
            EncodedRow([0, 1, 2, 3], [NO, NO, NO, NO], 4, 4),
        ),
    ],
)
def test_longer_pairs_are_cut_by_policy(policy: Any, expected: EncodedRow | None) -> None:
    pair = encode_pair(
        sequence([0, 1, 2, 3], [5, 9]), sequence([0, 1, 2, 3], [6, 9]), 4, policy, num_kept=1
    )
    if policy == "completion_right":  # no token of an answer is left: the caller names the row
        assert pair is not None and pair.input_ids == [] and pair.num_supervised_cut == 4
    else:
        assert pair == expected


def test_answers_lose_their_ends_and_it_is_counted() -> None:
    pair = encode_pair(sequence([0, 1], [5, 6, 9]), sequence([0, 1], [7, 9]), 4, "completion_right")
    assert pair == EncodedRow(
        [0, 1, 5, 6, 7, 9], [NO, NO, 5, 6, 7, 9], 1, 1, 2, 2, num_answers_cut=1
    )


def test_a_prompt_is_found_in_whole_conversations() -> None:
    talk = "\n\nHuman: Hai\n\nAssistant: Halo\n\nHuman: Apa kabar?\n\nAssistant:"
    assert common_prompt(f"{talk} Baik.", f"{talk} Buruk.") == talk
    assert common_prompt("a b c", "a b d") == "a b "


def test_conversations_share_all_turns_but_the_last() -> None:
    turns = [{"role": "user", "content": "Hai"}]
    row = {
        "chosen": [*turns, {"role": "assistant", "content": "Halo!"}],
        "rejected": [*turns, {"role": "assistant", "content": "Apa?"}],
    }
    pair = preference(row, PLAIN)
    assert pair["chosen"]["messages"][-1]["content"] == "Halo!"
    assert pair["rejected"]["messages"][:-1] == turns
    assert own_words(row, "preference", PLAIN).asked == "Hai"


def test_templates_read_any_fields() -> None:
    templates = Templates("preference", "T: {q}", None, " {good}", " {bad}")
    pair = preference({"q": "1?", "good": "satu", "bad": "dua"}, templates)
    assert pair["chosen"] == {"prompt": "T: 1?", "completion": " satu"}
    assert pair["rejected"] == {"prompt": "T: 1?", "completion": " dua"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "the chosen answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "the rejected answer is empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        ({"prompt": "a", "chosen": "b"}, "the field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "the field 'rejected' is null"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises((EmptyCompletion, RowError), match=told):
        preference(row, PLAIN)


def test_answers_cut_to_the_same_beginning_are_a_problem() -> None:
    both = sequence([0, 1], [5, 6, 7]), sequence([0, 1], [5, 6, 8])
    pair = encode_pair(*both, 4, "completion_right")
    assert pair is not None and pair.input_ids == []
    assert pair.problem == "both answers are cut, and what is left of them is the same"
    apart = encode_pair(
        sequence([0, 1], [5, 6, 7]), sequence([0, 1], [8, 6, 7]), 4, "completion_right"
    )
    assert apart is not None and (apart.problem, apart.num_answers_cut) == ("", 2)


@pytest.mark.parametrize(
    ("given", "margin"),
    [({}, 0.0), ({"margin": None}, 0.0), ({"margin": 2}, 2.0), ({"margin": "1.5"}, 1.5)],
)
def test_a_margin_is_read_where_there_is_one(given: dict[str, Any], margin: float) -> None:
    assert (
        preference({"prompt": "a", "chosen": "b", "rejected": "c", **given}, PLAIN)["margin"]
        == margin
    )


@pytest.mark.parametrize("margin", ["viel", True, float("nan"), [1]])
def test_a_margin_that_is_no_number_is_nan_for_who_uses_it_to_refuse(margin: Any) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}
    assert math.isnan(preference(row, PLAIN)["margin"])
