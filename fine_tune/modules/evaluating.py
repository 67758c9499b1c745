"""A module that is measured and asked, whatever fits the device: what guards may set, and what follows a failure."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from torch import Tensor

from fine_tune.batches import PredictBatch, StepFailure
from fine_tune.errors import RunStopped
from fine_tune.modules.evaluation import answer, in_parts, log_evaluation
from fine_tune.modules.huggingface import HuggingFaceModule
from fine_tune.modules.metrics import TokenMetrics
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.precision import follow_precision
from fine_tune.modules.prediction import Predicting, write_answers
from fine_tune.modules.row_losses import RowLosses
from fine_tune.modules.step_log import Throughput
from fine_tune.modules.together import stopping_together


class EvaluatingModule(HuggingFaceModule):
    """What a module is before it takes steps: rows are evaluated, prompts answered, and guards help where that fails.

    A subclass says how rows are cut and measured: ``take_rows``, ``evaluate``, ``loss_of_no_weight``.

    Args:
        settings: Which model, and how it is loaded.
        compile: Let torch compile the model's repeated blocks.
    """

    evaluation_metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, settings: ModelSettings, *, compile: bool) -> None:
        super().__init__(settings, compile=compile)
        self.metrics: Any = TokenMetrics()
        self.row_losses = RowLosses()
        self.measured_rows: np.ndarray | None = None  # [R, 3] of the last: id, count, loss
        self.throughput = Throughput()
        self.intervals: dict[str, list[float]] = {}  # of 95 %, of what was measured last
        self.counted: dict[str, tuple[int, int]] = {}  # shares that are counts: n of how many
        # What guards may set: the budget in force, the precision of steps (None: the trainer's), whether the trained
        # state is copied before each update; a handler says whether it changed something that may help.
        self.max_tokens_per_micro_batch: int | None = None
        self.step_precision: str | None = None
        self.rows_attention: str | None = None  # of steps and evaluations; None: the model's own
        self.prompts_at_once: int | None = None  # answered; None: all
        self.keeps_state = False
        self.failure_handlers: dict[str, Callable[[StepFailure], bool]] = {}
        self.predicting = Predicting()
        self.spare_row: Any = None  # for passes that count nothing

    # ---- what a subclass says

    @property
    def can_generate(self) -> bool:
        """Whether its model writes answers."""
        return self.head == "lm"

    @abstractmethod
    def take_rows(self, batch: Any, rows: slice) -> Any:
        """Return the micro-batch that holds these rows of the batch."""

    @abstractmethod
    def evaluate(self, micro_batch: Any) -> None:
        """Add a micro-batch of an evaluation split to ``self.metrics``."""

    @abstractmethod
    def loss_of_no_weight(self, micro_batch: Any) -> Tensor:
        """Take the forward passes of a micro-batch and count nothing; return 0, with its graph."""

    @property
    def compares_rows(self) -> bool:
        """Whether each row's loss is kept: of the validation that makes a run's result, not of those while training."""
        return self.trainer.state.fn == "validate"

    def interval_metrics(self) -> dict[str, Tensor]:
        """Return what it counted besides, over all ranks; asked for where a row of ``metrics.csv`` is written."""
        return {}

    # ---- guards

    def handle(self, failure: StepFailure) -> None:
        """Let the guards change something, after which the rows are taken again.

        Raises:
            RuntimeError: No guard can help.
        """
        try:
            helped = any(handler(failure) for handler in self.failure_handlers.values())
        except RunStopped as stopped:
            stopped.on_all_ranks = failure.on_all_ranks
            raise
        if not helped:
            raise RuntimeError(
                f"{failure.kind} in the {failure.stage} of step {failure.step}, rows {failure.row_ids}"
            )

    def lower_precision(self, precision: str) -> None:
        """Compute in a safer precision from the step at hand on, whatever the trainer's."""
        assert self.model is not None
        follow_precision(self.model, precision)
        self.step_precision = precision

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        stopping_together(self, lambda: in_parts(self, batch, self.evaluate))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.throughput.pause()

    def on_validation_epoch_end(self) -> None:
        log_evaluation(self, "val")
        self.throughput.go_on()

    def on_test_epoch_end(self) -> None:
        log_evaluation(self, "test")

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> None:
        write_answers(self, batch)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int]
    ) -> list[list[int]]:
        """Answer prompts greedily.

        Args:
            prompts: Token ids of each prompt; they are padded on the left together.
            max_new_tokens: Tokens to write at most.
            stop_ids: Tokens that end an answer.

        Returns:
            Token ids of each answer, without the stop token.
        """
        pad_token_id = int(cast(int, self.tokenizer.pad_token_id))
        return answer(self, prompts, max_new_tokens, stop_ids, pad_token_id)
