"""Pairs laid out for a model: the prompt computed once for both answers, or two rows a pair.

Shape letters: B pairs, T tokens, N positions, 2 answers (chosen, rejected).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fine_tune.batches import PreferenceBatch, on_device
from fine_tune.losses import IGNORE_INDEX

SHARING_ATTENTION = ("sdpa", "eager")  # take a mask of any shape
PROBE_TOKENS = 7


def pair_inputs(
    model: Any, batch: PreferenceBatch, *, shared: bool
) -> tuple[dict[str, Any], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Lay pairs out for the model.

    Args:
        model: Any model of hidden states.
        batch: Pairs; see ``PreferenceBatch``.
        shared: The prompt once, both answers behind it under a mask with restarted positions; exact. False: two rows a
            pair, for any attention.

    Returns:
        The model's inputs, and a function ``place(rows_N, positions_N, sides_N)`` that finds positions of the batch's
        rows in the flattened hidden states, as the answer on that side (0 chosen, 1 rejected) sees them.
    """
    input_ids_BT, device = batch["input_ids_BT"], batch["input_ids_BT"].device
    num_tokens = input_ids_BT.shape[1]
    num_prompt_B, num_chosen_B = (
        on_device(batch[name], device) for name in ("num_prompt", "num_chosen")
    )
    if shared:
        mask_BTT, position_ids_BT = _shared_layout(num_prompt_B, num_chosen_B, num_tokens)
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "position_ids": position_ids_BT}
        inputs["attention_mask"] = _mask_for(model, mask_BTT)
    else:
        inputs = {"input_ids": _two_rows(batch)}

    def place(rows_N: Tensor, positions_N: Tensor, sides_N: Tensor) -> Tensor:
        if shared:
            return rows_N * num_tokens + positions_N
        moved_N = num_chosen_B[rows_N] * sides_N  # how far the rejected answer moved
        behind_N = positions_N >= num_prompt_B[rows_N]
        positions_N = positions_N - torch.where(behind_N, moved_N, 0)
        return (2 * rows_N + sides_N) * inputs["input_ids"].shape[1] + positions_N

    return inputs, place


def take_pairs(batch: PreferenceBatch, rows: slice) -> PreferenceBatch:
    """Return the micro-batch that holds these pairs of the batch."""
    longest = batch["lengths"][rows.start]
    return PreferenceBatch(
        input_ids_BT=batch["input_ids_BT"][rows, :longest],
        labels_BT=batch["labels_BT"][rows, :longest],
        lengths=batch["lengths"][rows],
        num_prompt=batch["num_prompt"][rows],
        num_chosen=batch["num_chosen"][rows],
        num_supervised=batch["num_supervised"][rows],
        margins=batch["margins"][rows],
        row_ids=batch["row_ids"][rows],
    )


def can_share(model: Any, compute: Callable[[Any, PreferenceBatch, bool], Tensor]) -> bool:
    """Whether a model gives the same with the prompt computed once: asked of its config, then of the model itself.

    Args:
        model: The model.
        compute: What is compared of pairs, with the prompt shared or not: values whose size does not vanish.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = layers != {"full_attention"}
    if config._attn_implementation not in SHARING_ATTENTION or window:
        return False
    device = model.device
    ids = torch.arange(3 * PROBE_TOKENS, device=device)[None] % (config.vocab_size - 1) + 1
    labels = ids.clone()
    labels[:, :PROBE_TOKENS] = IGNORE_INDEX
    probe = PreferenceBatch(
        input_ids_BT=ids,
        labels_BT=labels,
        lengths=[3 * PROBE_TOKENS],
        num_prompt=[PROBE_TOKENS],
        num_chosen=[PROBE_TOKENS],
        num_supervised=[2 * PROBE_TOKENS],
        margins=[0.0],
        row_ids=[0],
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = (compute(model, probe, shared) for shared in (True, False))
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no such mask, or no positions
    finally:
        model.train(was_training)
    is_wide = one.dtype == torch.float64 or (one.dtype == model.dtype == torch.float32)
    tolerance = (
        1e-4 if is_wide else 5e-2
    )  # of 16 bit: noise is far below it, another token's answer far above
    return bool(torch.linalg.norm(one - two) <= tolerance * torch.linalg.norm(two))


def _shared_layout(
    num_prompt_B: Tensor, num_chosen_B: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    at_T = torch.arange(num_tokens, device=num_prompt_B.device)
    second_B1 = (num_prompt_B + num_chosen_B)[:, None]
    # 0 the prompt, 1 the chosen answer, 2 the rejected answer and the padding behind it
    part_BT = (at_T >= num_prompt_B[:, None]).long() + (at_T >= second_B1).long()
    position_ids_BT = torch.where(part_BT == 2, at_T - num_chosen_B[:, None], at_T)
    seen_BTT = (part_BT[:, None, :] == 0) | (part_BT[:, None, :] == part_BT[:, :, None])
    return seen_BTT & (at_T[None, :, None] >= at_T[None, None, :]), position_ids_BT


def _mask_for(model: Any, mask_BTT: Tensor) -> Tensor:
    mask_B1TT = mask_BTT[:, None]
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return mask_B1TT
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(mask_B1TT, dtype=model.dtype).masked_fill(~mask_B1TT, lowest)


def _two_rows(batch: PreferenceBatch) -> Tensor:
    """Return ``[2B, T]`` token ids, chosen and rejected by turns."""
    ids_BT, rows = batch["input_ids_BT"], []
    for i, (prompt, chosen, length) in enumerate(
        zip(batch["num_prompt"], batch["num_chosen"], batch["lengths"], strict=True)
    ):
        rows.append(ids_BT[i, : prompt + chosen])
        rows.append(torch.cat([ids_BT[i, :prompt], ids_BT[i, prompt + chosen : length]]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
