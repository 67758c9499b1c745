"""Probe prompts: the same few rows through two models, to see whether they are the same model."""

import random
from typing import Any

import torch
from torch import Tensor

from fine_tune.callbacks.generations import GENERATIONS_FILE, read_generations
from fine_tune.modules.checks import max_positions
from fine_tune.trained_model import TrainedModel

OF_THE_RUN, AT_RANDOM, LONGEST = 8, 4, 128  # rows, rows, tokens


def probe_rows(trained: TrainedModel) -> list[list[int]]:
    """Return token ids of what the run was asked, with the answers, and of random rows that end as answers do.

    Ids that the tokenizer knows and the model does not are left out.
    """
    tokenizer, config = trained.tokenizer, trained.model_config()
    texts = dict.fromkeys(
        f"{answer.get('prompt', '')} {answer.get('expected', '')}"
        for answer in read_generations(trained.run.path / GENERATIONS_FILE)
        if isinstance(answer, dict)
    )
    known = range(int(config.get_text_config().vocab_size))
    rows = [tokenizer(text)["input_ids"] for text in list(texts)[:OF_THE_RUN]]
    draw = random.Random(0)
    vocabulary = sorted(i for i in tokenizer.get_vocab().values() if i in known)
    longest = min(LONGEST, max_positions(config) or LONGEST)
    stop = [tokenizer.eos_token_id] if tokenizer.eos_token_id in known else []
    for i in range(AT_RANDOM):
        rows.append([*draw.choices(vocabulary, k=max(2, longest // 2**i - len(stop))), *stop])
    kept = ([i for i in row if i in known][-longest:] for row in rows)
    return [row for row in kept if row]


@torch.no_grad()
def logits(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Return the model's logits of each row in float32; of a reward model, its scores."""
    return [model(input_ids=torch.tensor([row])).logits.float() for row in rows]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest absolute difference; not a number if anything is."""
    return float(
        torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max()
    )
