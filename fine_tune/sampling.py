"""How an answer is written: the settings, and the choice of each next token. Pure functions of logits.

Shape letters: B answers, T tokens before the next one, V vocabulary.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_tune.errors import UserError

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Args:
        max_new_tokens: Tokens an answer may have. None: 256, or half of the model's positions where that is less.
        temperature: 0 takes the likeliest token each time; 1 draws by the model's own probabilities, lower ones are
            closer to the likeliest.
        top_p: Draw from the likeliest tokens that hold this share of the probability together (nucleus sampling).
        top_k: Draw from this many of the likeliest tokens; 0: from all.
        repetition_penalty: Divides the logits of tokens that stand in the prompt or the answer already (CTRL, arXiv
            1909.05858); 1: none.
        seed: Decides what is drawn, for each row by itself: neither the batch nor a restart changes it.
        answers: Answers to each row; above 1, ``prediction`` is a list.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42
    answers: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(
                f"sampling.max_new_tokens: must be at least 1, got {self.max_new_tokens}"
            )
        if not 0 <= self.temperature < float("inf"):
            problems.append(
                f"sampling.temperature: must be 0 or above, and finite; got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"sampling.top_p: lies above 0 and up to 1, got {self.top_p}")
        if self.top_k < 0:
            problems.append(f"sampling.top_k: must not be negative, got {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(
                f"sampling.repetition_penalty: must be above 0 and finite, got {self.repetition_penalty}"
            )
        if self.answers < 1:
            problems.append(f"sampling.answers: must be at least 1, got {self.answers}")
        if self.answers > 1 and self.temperature == 0:
            problems.append(
                f"sampling.answers: {self.answers} answers at temperature 0 are all the same; "
                "set sampling.temperature, like 0.7"
            )
        if problems:
            raise UserError(*problems)

    def tokens(self, positions: int | None) -> int:
        """Return the tokens an answer may have, for a model of so many positions (None: no limit)."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return MAX_NEW_TOKENS if positions is None else max(1, min(MAX_NEW_TOKENS, positions // 2))

    def draws(self, *key: int) -> random.Random:
        """Return the random numbers of one answer: one number per token, whatever its batch.

        Args:
            key: What makes the answer another than the others, like its row.
        """
        return random.Random(" ".join(map(str, (self.seed, *key))))


def next_tokens(
    logits_BV: Tensor,
    sampling: Sampling,
    *,
    draws: list[random.Random],
    contexts: list[list[int]],
) -> list[int]:
    """Choose the next token of each answer, in the order of ``transformers``: penalty, temperature, top k, top p.

    A drawn token is where a uniform number falls in the cumulated probabilities, so each answer takes one number.

    Args:
        logits_BV: Of the next token.
        sampling: How to choose.
        draws: Random numbers of each answer.
        contexts: Tokens each answer has before it, its prompt's included.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1:
        logits_BV = _penalized(logits_BV, contexts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return [int(token) for token in logits_BV.argmax(-1).tolist()]
    kept_BV, ids_BV = logits_BV / sampling.temperature, None
    if 0 < sampling.top_k < logits_BV.shape[1]:
        kept_BV, ids_BV = kept_BV.topk(sampling.top_k)
    elif sampling.top_p < 1:
        kept_BV, ids_BV = kept_BV.sort(descending=True)
    probabilities_BV = kept_BV.softmax(-1).double()
    if sampling.top_p < 1:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV * (before_BV < sampling.top_p)
    up_to_BV = probabilities_BV.cumsum(-1)
    uniform_B1 = torch.tensor([[draw.random()] for draw in draws], dtype=torch.float64)
    point_B1 = uniform_B1.to(up_to_BV.device) * up_to_BV[:, -1:]
    chosen_B1 = torch.searchsorted(up_to_BV, point_B1, right=True).clamp(max=up_to_BV.shape[1] - 1)
    if ids_BV is not None:
        chosen_B1 = ids_BV.gather(1, chosen_B1)
    return [int(token) for (token,) in chosen_B1.tolist()]


def _penalized(logits_BV: Tensor, contexts: list[list[int]], penalty: float) -> Tensor:
    columns = max(map(len, contexts))
    padded = [context + context[:1] * (columns - len(context)) for context in contexts]
    ids_BT = torch.tensor(padded, device=logits_BV.device)
    logits_BT = logits_BV.gather(1, ids_BT)
    penalized_BT = torch.where(logits_BT > 0, logits_BT / penalty, logits_BT * penalty)
    return logits_BV.scatter(1, ids_BT, penalized_BT)
