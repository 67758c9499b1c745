"""What ``predict`` asks of a module: answers to prompts, or the rewards of answers; each told as soon as it is there.

Shape letters: B rows, T tokens, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fine_tune.batches import PredictBatch, StepFailure
from fine_tune.modules.decoding import Answer, Decoder
from fine_tune.modules.evaluation import in_parts
from fine_tune.sampling import Sampling

if TYPE_CHECKING:
    from fine_tune.modules.evaluating import EvaluatingModule

CPU_TOKENS, GPU_TOKENS = 2_048, 8_192  # of a forward pass where nobody says what fits
COLUMNS_PER_TOKEN = 8  # keys and values take far less than what training keeps of a token


def nobody(item: int, result: dict[str, Any]) -> None:
    """Hear of a result, and do nothing."""


@dataclass
class Predicting:
    """How a module predicts; the command line sets it.

    Args:
        sampling: How answers are written.
        max_new_tokens: Tokens an answer may have, resolved.
        max_columns: Keys and values of all rows at once, as out of memory taught; None: as many as a budget allows.
        tell: Hears of each item of a batch and its result: ``ids`` and ``finish_reason`` of each of its answers, or
            ``reward``.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    max_columns: int | None = None
    tell: Callable[[int, dict[str, Any]], None] = nobody


def write_answers(module: "EvaluatingModule", batch: PredictBatch) -> None:
    """Answer every prompt of a batch, as many at once as fit the device."""
    how = module.predicting
    answers = [
        Answer((item, number), ids.tolist(), how.max_new_tokens, how.sampling.draws(item, number))
        for item, ids in zip(batch["items"], batch["ids"], strict=True)
        for number in range(how.sampling.answers)
    ]
    decoder = Decoder(
        module.model,
        [*batch["stop_ids"], *generation_stops(module.model)],
        int(cast(int, module.tokenizer.pad_token_id)),
        how.sampling,
        how.max_columns or COLUMNS_PER_TOKEN * tokens_at_once(module),
    )

    def out_of_memory(rows: list[Answer], columns: int) -> None:
        lengths = [row.most_columns for row in rows]
        items = sorted({row.key[0] for row in rows})
        module.handle(
            StepFailure("out_of_memory", "generation", 0, items, lengths, len(rows), columns)
        )
        how.max_columns = columns // 2  # as the decoder does; the next batch begins with it

    written: dict[int, dict[int, Answer]] = {}
    for answer in decoder.write(answers, out_of_memory):
        item, number = answer.key
        of_item = written.setdefault(item, {})
        of_item[number] = answer
        if len(of_item) == how.sampling.answers:
            ended = [written[item][i] for i in range(how.sampling.answers)]
            reasons = [answer.ended for answer in ended]
            how.tell(item, {"ids": [a.written for a in ended], "finish_reason": reasons})
            del written[item]


def generation_stops(model: Any) -> list[int]:
    """Return the tokens that end an answer by the model's own generation config."""
    config = getattr(model, "generation_config", None)
    stops = config.eos_token_id if config is not None else None
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list) else [int(stops)]


def tokens_at_once(module: "EvaluatingModule") -> int:
    """Return the padded tokens of a forward pass: as set, or by the device."""
    default = CPU_TOKENS if module.device.type == "cpu" else GPU_TOKENS
    return module.max_tokens_per_micro_batch or default


def score_answers(
    module: "EvaluatingModule", batch: PredictBatch, score: Callable[..., Tensor]
) -> None:
    """Score every row of a batch, in parts that fit the device.

    Args:
        module: Cuts the batch.
        batch: Prompts with their answers.
        score: Gives the rewards ``[B]`` of padded rows ``[B, T]`` at the last token of each.
    """

    def take(rows: slice) -> None:
        lengths = batch["lengths"][rows]
        padded_BT = torch.zeros(len(lengths), lengths[0], dtype=torch.long)
        for row, ids in enumerate(batch["ids"][rows]):
            padded_BT[row, : len(ids)] = torch.from_numpy(ids)
        lasts_B = torch.tensor(lengths) - 1
        rewards_B = score(padded_BT.to(module.device), lasts_B.to(module.device))
        for item, reward in zip(batch["items"][rows], rewards_B.tolist(), strict=True):
            module.predicting.tell(item, {"reward": reward})

    module.max_tokens_per_micro_batch = tokens_at_once(module)
    in_parts(module, batch, take, take_rows=lambda _, rows: rows, row_ids=batch["items"])
