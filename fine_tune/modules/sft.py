"""Supervised fine-tuning: NLL summed over the step's supervised tokens, divided by their number."""

from typing import Any

from torch import Tensor

from fine_tune.batches import SFTBatch
from fine_tune.modules.base import StepModule
from fine_tune.modules.gradients import StepGradient
from fine_tune.modules.routers import Routers, routers_of
from fine_tune.modules.token_rows import (
    choose_attention,
    measure,
    real_tokens,
    summed_nll,
    take_rows,
)


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
        self.padded_because: str | None = None  # as the user was told
        self.routers: Routers | None = None  # of a mixture of experts that gives their scores

    def on_fit_start(self) -> None:
        choose_attention(self)
        self.routers = routers_of(self.model)
        self.step_metrics = ("balance_loss",) if self.routers is not None else ()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self.routers = None  # they are watched while training
            choose_attention(self)

    def on_test_start(self) -> None:
        self.routers = None
        choose_attention(self)

    def lower_precision(self, precision: str) -> None:
        super().lower_precision(precision)
        choose_attention(self)  # what is fast in 16 bit may not be there in 32

    def loss_count(self, batch: SFTBatch) -> int:
        return sum(batch["num_supervised"])

    def gradients(self, batch: SFTBatch) -> StepGradient:
        if self.routers is not None:
            self.routers.restart()
        return super().gradients(batch)

    def loss_sums(self, micro_batch: SFTBatch) -> tuple[Tensor, ...]:
        nll = summed_nll(self, micro_batch)
        if self.routers is None:
            return (nll,)
        # a mean over the micro-batch, weighed by its part of the step: transformers' own where it is all of it
        balance = self.routers.balance_loss(real_tokens(self, micro_batch))
        balance = balance * self.loss_count(micro_batch)
        pushed = self.routers.coefficient * balance if self.routers.coefficient else 0.0
        return nll + pushed, balance.detach()

    def loss_of_no_weight(self, micro_batch: SFTBatch) -> Tensor:
        return summed_nll(self, micro_batch) * 0.0  # routers do not count it

    def take_rows(self, batch: SFTBatch, rows: slice) -> SFTBatch:
        return take_rows(batch, rows)

    def interval_metrics(self) -> dict[str, Tensor]:
        routers = self.routers
        figures = {} if routers is None else routers.figures(self.device, self.trainer.world_size)
        return {f"experts/{name}": value for name, value in figures.items()}

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.routers is not None:
            self.routers.restart()

    def evaluate(self, micro_batch: SFTBatch) -> None:
        measure(self, micro_batch)
