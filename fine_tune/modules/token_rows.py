"""The NLL of rows of tokens: what supervised fine-tuning and pretraining share.

Shape letters: B rows, T tokens, N supervised positions, V vocabulary.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fine_tune.batches import SFTBatch, on_device
from fine_tune.errors import UserError
from fine_tune.losses import nll_per_token, nll_sum, supervised_targets
from fine_tune.modules.lm_head import head_at, nll_in_chunks
from fine_tune.modules.packing import (
    VARLEN,
    attention_without_masks,
    packed,
    same_logits,
    why_padded,
)
from fine_tune.modules.precision import lowered

if TYPE_CHECKING:
    from fine_tune.modules.sft import SFT

log = logging.getLogger("fine_tune")


def take_rows(batch: SFTBatch, rows: slice) -> SFTBatch:
    """Return the micro-batch that holds these rows of the batch."""
    longest = batch["lengths"][rows.start]
    return SFTBatch(
        input_ids_BT=batch["input_ids_BT"][rows, :longest],
        labels_BT=batch["labels_BT"][rows, :longest],
        lengths=batch["lengths"][rows],
        num_supervised=batch["num_supervised"][rows],
        row_ids=batch["row_ids"][rows],
    )


def summed_nll(module: "SFT", batch: SFTBatch) -> Tensor:
    """Return the NLL of a micro-batch's supervised tokens, summed, with its graph."""
    at_once = module.logit_chunks.at_once(module.model, sum(batch["num_supervised"]))
    if at_once is None:
        return nll_sum(*_supervised_logits(module, batch))
    inputs, positions_N, targets_N = _inputs(module, batch)
    return nll_in_chunks(module.model, inputs, positions_N, targets_N, at_once).sum()


def measure(module: "SFT", batch: SFTBatch) -> None:
    """Add a micro-batch of an evaluation split to the module's metrics: all of it, or none where memory runs out."""
    logits_NV, targets_N = _supervised_logits(module, batch)
    correct_N, routers = logits_NV.argmax(-1) == targets_N, module.routers
    nll_N, counts = nll_per_token(logits_NV, targets_N), batch["num_supervised"]
    chosen_LF = None if routers is None else routers.chosen(real_tokens(module, batch))
    losses_B = None
    if module.compares_rows:
        losses_B = torch.stack([nll_of_row_N.sum() for nll_of_row_N in nll_N.split(counts)])
    module.metrics.update(nll_N, correct_N, counts)
    if routers is not None and chosen_LF is not None:
        routers.add(chosen_LF)
    if losses_B is not None:
        module.row_losses.update(batch["row_ids"], counts, losses_B)


def real_tokens(module: "SFT", batch: SFTBatch) -> Tensor | None:
    """Return 1 for each token of the rows as the model got them, 0 for padding; None where there is none."""
    rows, longest = batch["input_ids_BT"].shape
    if module.packs or len(batch["lengths"]) * longest == sum(batch["lengths"]):
        return None
    lengths_B1 = on_device(batch["lengths"], module.device)[:, None]
    real_BT = torch.arange(longest, device=module.device).expand(rows, -1) < lengths_B1
    return real_BT.flatten()


def choose_attention(module: "SFT") -> None:
    """Attend without masks where the model gives the same so; pack where that saves work, or where the user says so.

    Raises:
        UserError: The user says so, and the model gives packed rows other logits.
    """
    model: Any = module.model
    module.packs, module.rows_attention = False, None
    with (
        module.trainer.precision_plugin.forward_context(),
        lowered(module.step_precision, module.device),
        torch.compiler.set_stance("force_eager"),  # a few rows once are not worth a graph
    ):
        kind = module.device.type
        autocast = torch.is_autocast_enabled(kind)
        computes_in = torch.get_autocast_dtype(kind) if autocast else model.dtype
        why = why_padded(model, computes_in)
        for attention in attention_without_masks(model, computes_in):
            pack = attention == VARLEN
            if not (pack and module.pack_rows is False) and same_logits(
                model, attention, pack=pack
            ):
                module.packs, module.rows_attention = pack, attention
                break
            if pack:
                why = "this model gives packed rows other logits than padded ones, or cannot take them"
        if module.pack_rows and not module.packs:
            if not same_logits(model, None, pack=True):
                raise UserError(
                    "model.pack_rows: this model gives packed rows other logits than padded ones, or cannot be "
                    "trained on them; leave it out"
                )
            module.packs, module.rows_attention = True, None
    if module.packs:
        how = module.rows_attention or "masked"
        log.info("rows of a micro-batch are packed, without padding (%s)", how)
    elif module.pack_rows is None and why not in (None, module.padded_because):
        log.info("rows of a micro-batch are padded: %s", why)
        module.padded_because = why


def _supervised_logits(module: "SFT", batch: SFTBatch) -> tuple[Tensor, Tensor]:
    model: Any = module.model
    inputs, positions_N, targets_N = _inputs(module, batch)
    with head_at(model, positions_N):
        output = model(**inputs, use_cache=False)
    return output.logits.squeeze(0), targets_N


def _inputs(module: "SFT", batch: SFTBatch) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return the model's inputs, and the positions and tokens that are predicted in them."""
    # Rows are padded on the right and attention is causal: no real token sees a pad, so no mask is needed.
    inputs: dict[str, Any] = {"input_ids": batch["input_ids_BT"]}
    labels_BT = batch["labels_BT"]
    if module.packs:
        inputs, labels_BT = packed(batch)
    if module.routers is not None:
        inputs["output_router_logits"] = True
    return inputs, *supervised_targets(labels_BT, sum(batch["num_supervised"]))
