"""A raw row with a chosen and a rejected answer -> both conversations or texts, then one encoded pair.

A pair is kept as prompt, chosen, rejected: the prompt once, however long it is.
"""

import math
from typing import Any, TypedDict

from fine_tune.data.encode import EncodedRow, Encoder, Segment, Truncation
from fine_tune.data.formats import Example, messages
from fine_tune.data.templates import (
    EmptyCompletion,
    Row,
    RowError,
    SameAnswers,
    Templates,
    field_text,
    fill,
)
from fine_tune.losses import IGNORE_INDEX

NEXT_SPEAKER = "\n\nAssistant:"  # of conversations written as one text, like Anthropic/hh-rlhf


class Pair(TypedDict):
    """The two examples of a row; their prompts, or all turns but the last ones, are the same.

    ``margin`` is by how much the chosen answer is better, where the data says so; else 0, and NaN if it is no number.
    """

    chosen: Example
    rejected: Example
    margin: float


def preference(row: Row, templates: Templates) -> Pair:
    """``prompt``, ``chosen`` and ``rejected``: texts (or templates over any fields), or lists of messages.

    Without a prompt, chosen and rejected are whole conversations, and the prompt is what both begin with. ``margin``, a
    number, may say by how much the chosen answer is better.

    Raises:
        RowError: A field is missing or of the wrong kind, or the two answers are the same or empty.
    """
    if isinstance(row.get("chosen"), list) and templates.chosen is None:
        return _conversations(row)
    prompt, chosen, rejected = (
        fill(template, row) if template is not None else _text(row, name)
        for name, template in (
            ("prompt", templates.prompt),
            ("chosen", templates.chosen),
            ("rejected", templates.rejected),
        )
    )
    if prompt is None:
        assert chosen is not None and rejected is not None
        prompt = common_prompt(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if chosen == rejected:
        raise SameAnswers("chosen and rejected are the same, so there is nothing to prefer")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not str(answer).strip():
            raise EmptyCompletion(f"the {name} answer is empty")
    if not prompt:
        raise RowError("the prompt is empty, and the first word of an answer needs one before it")
    return {
        "chosen": {"prompt": prompt, "completion": str(chosen)},
        "rejected": {"prompt": prompt, "completion": str(rejected)},
        "margin": _margin(row),
    }


def common_prompt(chosen: str, rejected: str) -> str:
    """Return what two conversations begin with, up to the last place where the assistant begins to speak.

    Without such a place, up to the last white space: ``"a b c"`` and ``"a b d"`` share ``"a b "``.
    """
    differs = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(differs, min(len(chosen), len(rejected)))]
    at = common.rfind(NEXT_SPEAKER)
    if at >= 0:
        return common[: at + len(NEXT_SPEAKER)]
    return common[: max(common.rfind(" "), common.rfind("\n")) + 1]


def pair_segments(encoder: Encoder, pair: Pair) -> list[list[Segment]]:
    """Lay both examples of a pair out as segments: the chosen one, then the rejected one."""
    return [encoder.segments(pair["chosen"]), encoder.segments(pair["rejected"])]


def encode_pairs(
    encoder: Encoder, rows: list[list[list[Segment]]], *, chat: bool
) -> list[EncodedRow | None]:
    """Tokenize a batch of pairs and truncate them; None stands for a pair the truncation policy drops."""
    sides = iter(encoder.ids_and_labels([side for row in rows for side in row], chat=chat))
    encoded = []
    for _ in rows:
        (ids, labels), rejected = next(sides), next(sides)
        encoded.append(
            encode_pair(
                (ids, labels),
                rejected,
                encoder.max_length,
                encoder.truncation,
                encoder.num_kept(ids),
            )
        )
    return encoded


def encode_pair(
    chosen: tuple[list[int], list[int]],
    rejected: tuple[list[int], list[int]],
    max_length: int,
    policy: Truncation,
    num_kept: int = 0,
) -> EncodedRow | None:
    """Write two sequences as the prompt they share and their two ends, each way at most ``max_length`` long.

    Args:
        chosen: Token ids and labels of prompt and chosen answer.
        rejected: The same with the rejected answer.
        max_length: Tokens that prompt and either answer may have.
        policy: ``drop`` leaves longer pairs out; ``prompt_left`` cuts the prompt behind its first ``num_kept``
            tokens, and leaves out what has no prompt left; ``completion_right`` cuts the answers' ends.
        num_kept: Tokens at the beginning that stay.

    Returns:
        The pair, or None where the policy leaves it out.
    """
    shared = 0
    for token, label, other, other_label in zip(*chosen, *rejected, strict=False):
        if token != other or label != IGNORE_INDEX or other_label != IGNORE_INDEX:
            break
        shared += 1
    prompt, ends = (
        chosen[0][:shared],
        [(ids[shared:], labels[shared:]) for ids, labels in (chosen, rejected)],
    )
    excess = shared + max(len(ids) for ids, _ in ends) - max_length
    num_cut = num_lost = num_answers_cut = 0
    if excess > 0 and policy == "drop":
        return None
    if excess > 0 and policy == "prompt_left":
        if shared - num_kept <= excess:
            return None
        prompt, num_cut = prompt[:num_kept] + prompt[num_kept + excess :], excess
    elif excess > 0:
        room = max(0, max_length - shared)
        num_cut = sum(max(0, len(ids) - room) for ids, _ in ends)
        num_answers_cut = sum(len(ids) > room for ids, _ in ends)
        num_lost = sum(label != IGNORE_INDEX for _, labels in ends for label in labels[room:])
        ends = [(ids[:room], labels[:room]) for ids, labels in ends]
    supervised = [any(label != IGNORE_INDEX for label in labels) for _, labels in ends]
    (chosen_ids, chosen_labels), (rejected_ids, rejected_labels) = ends
    problem = ""
    if not all(supervised) or not prompt:
        problem = "nothing of one of its answers is left"
    elif num_answers_cut == 2 and chosen_ids == rejected_ids:
        problem = "both answers are cut, and what is left of them is the same"
    if problem:
        return EncodedRow([], [], num_cut, num_lost, problem=problem)
    return EncodedRow(
        prompt + chosen_ids + rejected_ids,
        [IGNORE_INDEX] * len(prompt) + chosen_labels + rejected_labels,
        num_cut,
        num_lost,
        num_prompt=len(prompt),
        num_chosen=len(chosen_ids),
        num_answers_cut=num_answers_cut,
    )


def _text(row: Row, name: str) -> str | None:
    return None if name == "prompt" and row.get("prompt") is None else field_text(row, name)


def _conversations(row: Row) -> Pair:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    sides: dict[str, Any] = {}
    for name in ("chosen", "rejected"):
        turns = row.get(name)
        if not isinstance(turns, list) or not isinstance(prompt, list | None):
            raise RowError(f"'{name}' and 'prompt' must be lists of turns like 'chosen'")
        whole = {"messages": [*(prompt or []), *turns], "tools": row.get("tools")}
        sides[name] = messages(whole, Templates(None, None, None))
        if sides[name]["messages"][-1]["role"] != "assistant":
            raise RowError(f"'{name}' does not end with an assistant turn")
    chosen, rejected = sides["chosen"]["messages"], sides["rejected"]["messages"]
    if chosen == rejected:
        raise SameAnswers("chosen and rejected are the same, so there is nothing to prefer")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not str(turns[-1].get("content") or "").strip() and not turns[-1].get("tool_calls"):
            raise EmptyCompletion(f"the {name} answer is empty")
    return {"chosen": sides["chosen"], "rejected": sides["rejected"], "margin": _margin(row)}


def _margin(row: Row) -> float:
    """Read a margin; what is no number is told by the module that uses it."""
    value = row.get("margin")
    try:
        number = 0.0 if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) and not isinstance(value, bool) else math.nan
