"""The log-probabilities of both answers of a pair: with the prompt computed once, or as two rows of their own.

Shape letters: B pairs, T tokens, N predicted tokens, 2 answers (chosen, rejected).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fine_tune.batches import PreferenceBatch
from fine_tune.losses import IGNORE_INDEX, nll_per_token
from fine_tune.modules.lm_head import head_at

SHARING_ATTENTION = ("sdpa", "eager")  # take a mask of any shape
PROBE_TOKENS = 7


class PairLogps(NamedTuple):
    """Log-probabilities of answers.

    ``head_B2`` sums the tokens up to the length of the shorter answer, ``tail_B2`` those behind it (LD-DPO,
    arXiv 2409.06411, weighs them differently); ``num_tokens_B2`` counts both.
    """

    head_B2: Tensor
    tail_B2: Tensor
    num_tokens_B2: Tensor

    def weighted(self, ld_alpha: float) -> Tensor:
        """Return the log-probability of each answer, its tail weighed by ``ld_alpha``."""
        return self.head_B2 + ld_alpha * self.tail_B2


class _Targets(NamedTuple):
    rows_N: Tensor
    positions_N: Tensor  # in the pair's row, of the token that predicts
    tokens_N: Tensor
    sides_N: Tensor
    ranks_N: Tensor  # how many predicted tokens of the answer come before


def pair_logps(model: Any, batch: PreferenceBatch, *, shared: bool) -> PairLogps:
    """Compute the log-probabilities of both answers of each pair.

    Args:
        model: A causal language model.
        batch: Pairs; see ``PreferenceBatch``.
        shared: The prompt once, both answers behind it under a mask with restarted positions; exact. False: two rows a
            pair, for any attention.
    """
    input_ids_BT, device = batch["input_ids_BT"], batch["input_ids_BT"].device
    num_prompt_B = torch.tensor(batch["num_prompt"], device=device)
    num_chosen_B = torch.tensor(batch["num_chosen"], device=device)
    targets = _targets(batch["labels_BT"], num_prompt_B, num_chosen_B)
    if shared:
        mask_BTT, position_ids_BT = _shared_layout(
            num_prompt_B, num_chosen_B, input_ids_BT.shape[1]
        )
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "position_ids": position_ids_BT}
        inputs["attention_mask"] = _mask_for(model, mask_BTT)
        positions_N = targets.rows_N * input_ids_BT.shape[1] + targets.positions_N
    else:
        two_rows, offsets_B = _two_rows(batch)
        inputs = {"input_ids": two_rows}
        start_N = offsets_B[targets.rows_N] * targets.sides_N  # where the rejected answer lay
        behind_N = targets.positions_N >= num_prompt_B[targets.rows_N]
        positions_N = targets.positions_N - torch.where(behind_N, start_N, 0)
        positions_N = (2 * targets.rows_N + targets.sides_N) * two_rows.shape[1] + positions_N
    with head_at(model, positions_N):
        logits = model(**inputs, use_cache=False).logits.squeeze(0)
    logps_N = -nll_per_token(logits, targets.tokens_N)
    return _summed(logps_N, targets, len(batch["lengths"]))


def can_share(model: Any) -> bool:
    """Whether a model gives the same with the prompt computed once: asked of its config, then of the model itself."""
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
        row_ids=[0],
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = (pair_logps(model, probe, shared=shared).head_B2 for shared in (True, False))
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no such mask, or no positions
    finally:
        model.train(was_training)
    tolerance = 1e-4 if one.dtype == torch.float32 and model.dtype == torch.float32 else 2e-2
    return bool(torch.allclose(one, two, rtol=tolerance, atol=0))


def _targets(labels_BT: Tensor, num_prompt_B: Tensor, num_chosen_B: Tensor) -> _Targets:
    rows_N, at_N = torch.nonzero(labels_BT != IGNORE_INDEX, as_tuple=True)
    second_N = num_prompt_B[rows_N] + num_chosen_B[rows_N]  # where the rejected answer begins
    sides_N = (at_N >= second_N).long()
    predicting_N = torch.where(at_N == second_N, num_prompt_B[rows_N], at_N) - 1
    groups_N = 2 * rows_N + sides_N  # in ascending order
    counts = torch.bincount(groups_N, minlength=2 * len(labels_BT))
    first_N = (counts.cumsum(0) - counts)[groups_N]
    ranks_N = torch.arange(len(at_N), device=at_N.device) - first_N
    return _Targets(rows_N, predicting_N, labels_BT[rows_N, at_N], sides_N, ranks_N)


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


def _two_rows(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Return ``[2B, T]`` token ids, chosen and rejected by turns, and how far each rejected answer moved."""
    ids_BT, rows = batch["input_ids_BT"], []
    for i, (prompt, chosen, length) in enumerate(
        zip(batch["num_prompt"], batch["num_chosen"], batch["lengths"], strict=True)
    ):
        rows.append(ids_BT[i, : prompt + chosen])
        rows.append(torch.cat([ids_BT[i, :prompt], ids_BT[i, prompt + chosen : length]]))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.tensor(batch["num_chosen"], device=ids_BT.device)


def _summed(logps_N: Tensor, targets: _Targets, num_pairs: int) -> PairLogps:
    groups_N = 2 * targets.rows_N + targets.sides_N
    counts = torch.bincount(groups_N, minlength=2 * num_pairs).view(num_pairs, 2)
    in_head_N = targets.ranks_N < counts.min(1).values[targets.rows_N]
    # sums of hundreds of tokens are soon subtracted from one another: in float64 where the device has it
    wide = logps_N.dtype if logps_N.device.type == "mps" else torch.float64
    logps_N, empty = logps_N.to(wide), torch.zeros(2 * num_pairs, dtype=wide, device=logps_N.device)
    head, tail = (
        empty.index_add(0, groups_N, logps_N * chosen_N).view(num_pairs, 2)
        for chosen_N in (in_head_N, ~in_head_N)
    )
    return PairLogps(head, tail, counts)
