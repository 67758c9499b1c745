"""Supervised fine-tuning: NLL summed over the step's supervised tokens, divided by their number."""

from typing import Any

from torch import Tensor

from fine_tune.batches import SFTBatch
from fine_tune.modules.base import StepModule
from fine_tune.modules.token_rows import choose_attention, measure, summed_nll, take_rows


class SFT(StepModule):
    __doc__ = (
        (StepModule.__doc__ or "")
        .replace(
            "Base of all modules: builds the model, and takes one optimizer step per batch.",
            "Supervised fine-tuning of a causal language model, all weights or LoRA.",
        )
        .replace(
            "    Args:\n",
            """    Args:
        pack_rows: Put the rows of a micro-batch behind one another instead of padding them; exact, no row sees another.
            None: where torch has a kernel for it (a GPU, 16 bit) and the model passes a check.
""",
        )
    )

    def __init__(
        self, model_name_or_path: str | None = None, pack_rows: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model_name_or_path=model_name_or_path, **kwargs)
        self.pack_rows, self.packs = pack_rows, False

    def on_fit_start(self) -> None:
        choose_attention(self)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            choose_attention(self)

    def on_test_start(self) -> None:
        choose_attention(self)

    def lower_precision(self, precision: str) -> None:
        super().lower_precision(precision)
        choose_attention(self)  # what is fast in 16 bit may not be there in 32

    def loss_count(self, batch: SFTBatch) -> int:
        return sum(batch["num_supervised"])

    def loss_sums(self, micro_batch: SFTBatch) -> tuple[Tensor]:
        return (summed_nll(self, micro_batch),)

    def take_rows(self, batch: SFTBatch, rows: slice) -> SFTBatch:
        return take_rows(batch, rows)

    def evaluate(self, micro_batch: SFTBatch) -> None:
        measure(self, micro_batch)
