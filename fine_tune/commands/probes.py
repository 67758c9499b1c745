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
    """Return token ids of prompts that the run was asked, with their answers, and of random rows."""
    tokenizer = trained.tokenizer
    answers = read_generations(trained.run.path / GENERATIONS_FILE)
    texts = dict.fromkeys(f"{a['prompt']} {a['expected']}" for a in answers)
    rows = [tokenizer(text)["input_ids"] for text in list(texts)[:OF_THE_RUN]]
    draw, vocabulary = random.Random(0), sorted(tokenizer.get_vocab().values())
    positions = max_positions(trained.model_config()) or LONGEST
    longest = min(LONGEST, positions)
    rows += [draw.choices(vocabulary, k=max(2, longest // 2**i)) for i in range(AT_RANDOM)]
    return [row[:longest] for row in rows if row]


@torch.inference_mode()
def logits(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Return the model's logits of each row in float32; of a reward model, its scores."""
    return [model(input_ids=torch.tensor([row])).logits.float() for row in rows]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest absolute difference; not a number if anything is."""
    return float(
        torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max()
    )
