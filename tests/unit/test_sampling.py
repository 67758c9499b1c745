"""The choice of the next token, on literal logits."""

import random

import pytest
import torch

from fine_tune.errors import UserError
from fine_tune.sampling import Sampling, next_tokens

LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


class At(random.Random):
    """Draws one number for ever."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def drawn(number: float, logits: torch.Tensor = LOGITS, **settings: float) -> int:
    sampling = Sampling(**{"temperature": 1.0, **settings})  # type: ignore[arg-type]
    (token,) = next_tokens(logits, sampling, draws=[At(number)], contexts=[[0]])
    return token


def test_temperature_0_takes_the_likeliest_token() -> None:
    assert next_tokens(LOGITS, Sampling(), draws=[At(0.99)], contexts=[[]]) == [0]


def test_a_token_is_drawn_where_the_number_falls_in_the_cumulated_probabilities() -> None:
    assert [drawn(u) for u in (0.0, 0.39, 0.41, 0.69, 0.71, 0.91)] == [0, 0, 1, 1, 2, 3]


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert [drawn(u, top_k=2) for u in (0.56, 0.58, 0.99)] == [0, 1, 1]  # 4/7 and 3/7
    assert [drawn(u, top_p=0.7) for u in (0.56, 0.58, 0.99)] == [0, 1, 1]
    assert drawn(0.99, top_p=0.71) == 2
    assert drawn(0.99, top_p=0.001) == 0
    assert drawn(0.99, top_k=3, top_p=0.45) == 1  # of 4/9, 3/9, 2/9


def test_a_low_temperature_is_close_to_the_likeliest() -> None:
    assert drawn(0.9, temperature=0.1) == 0


def test_repetition_is_penalized_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.1]])
    sampling = Sampling(repetition_penalty=2.0)
    assert next_tokens(logits, sampling, draws=[At(0)], contexts=[[0, 0]]) == [1]
    assert next_tokens(logits[:, 2:], sampling, draws=[At(0)], contexts=[[0]]) == [1]


def test_draws_are_of_the_seed_and_the_row() -> None:
    first = Sampling(seed=1).draws(3, 0).random()
    assert Sampling(seed=1).draws(3, 0).random() == first
    others = [
        Sampling(seed=2).draws(3, 0),
        Sampling(seed=1).draws(30),
        Sampling(seed=1).draws(3, 1),
    ]
    assert all(other.random() != first for other in others)


def test_what_cannot_be_meant_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(max_new_tokens=0, temperature=float("nan"), top_k=-1, answers=0)
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="are all the same"):
        Sampling(answers=2)


def test_an_answer_has_at_most_half_of_the_positions_unless_asked() -> None:
    assert Sampling().tokens(None) == 256
    assert Sampling().tokens(128) == 64
    assert Sampling(max_new_tokens=100).tokens(128) == 100
