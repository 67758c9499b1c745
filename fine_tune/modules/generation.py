"""Greedy answers to a batch of prompts."""

from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Answer prompts, padded on the left together.

    Args:
        model: A Hugging Face causal language model; it is put into evaluation mode meanwhile.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens to write at most.
        stop_ids: Tokens that end an answer.
        pad_token_id: Fills the space before shorter prompts; it is masked.

    Returns:
        Token ids of each answer, without the stop token.
    """
    longest = max(len(prompt) for prompt in prompts)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - longest)
    if max_new_tokens < 1:
        return [
            [] for _ in prompts
        ]  # the prompt fills the model's positions: there is no room to answer
    input_ids = torch.tensor(
        [[pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device
    )
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    was_training = model.training
    model.eval()
    written = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad_token_id,
        eos_token_id=stop_ids,
    )
    model.train(was_training)
    answers = []
    for row in written[:, longest:].tolist():
        stop = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
        answers.append(row[:stop])
    return answers
