"""Supervised fine-tuning: NLL summed over the step's supervised tokens, divided by their number.

Shape letters: B rows, T tokens, N supervised positions, D model, V vocabulary.
"""

from torch import Tensor

from fine_tune.batches import SFTBatch
from fine_tune.losses import nll_per_token, nll_sum, supervised_targets
from fine_tune.modules.base import StepModule
from fine_tune.modules.lm_head import head_at


class SFT(StepModule):
    __doc__ = (StepModule.__doc__ or "").replace(
        "Base of all modules: builds the model, and takes one optimizer step per batch.",
        "Supervised fine-tuning of a causal language model, all weights or LoRA.",
    )

    def loss_count(self, batch: SFTBatch) -> int:
        return sum(batch["num_supervised"])

    def loss_sums(self, micro_batch: SFTBatch) -> tuple[Tensor]:
        return (nll_sum(*self._supervised_logits(micro_batch)),)

    def take_rows(self, batch: SFTBatch, rows: slice) -> SFTBatch:
        longest = batch["lengths"][rows.start]
        return SFTBatch(
            input_ids_BT=batch["input_ids_BT"][rows, :longest],
            labels_BT=batch["labels_BT"][rows, :longest],
            lengths=batch["lengths"][rows],
            num_supervised=batch["num_supervised"][rows],
            row_ids=batch["row_ids"][rows],
        )

    def evaluate(self, micro_batch: SFTBatch) -> None:
        logits_NV, targets_N = self._supervised_logits(micro_batch)
        correct_N = logits_NV.argmax(-1) == targets_N
        nll_N = nll_per_token(logits_NV, targets_N)
        self.metrics.update(nll_N, correct_N, micro_batch["num_supervised"])

    def _supervised_logits(self, batch: SFTBatch) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        positions_N, targets_N = supervised_targets(batch["labels_BT"])
        with head_at(self.model, positions_N):
            # Rows are padded on the right and attention is causal: no real token sees a pad, so no mask is needed.
            output = self.model(input_ids=batch["input_ids_BT"], use_cache=False)
        return output.logits.squeeze(0), targets_N
