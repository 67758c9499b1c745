"""The optimizer step: micro-batches forward and backward, one division, one synchronisation, one update.

Lightning's automatic optimization stays in charge of clipping, precision, scaler and schedule. ``training_step`` runs
the backwards itself and returns a detached loss, so Lightning's own backward finds nothing to do.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fine_tune.batches import DataPlan, PredictBatch, StepFailure
from fine_tune.errors import RunStopped, UserError
from fine_tune.modules.changed_settings import (
    follow_settings,
    forget_failed_step,
    step_settings,
)
from fine_tune.modules.checks import warmup_problems
from fine_tune.modules.evaluation import answer, in_parts, log_evaluation
from fine_tune.modules.gradients import StepGradient, gradients, update
from fine_tune.modules.huggingface import HuggingFaceModule
from fine_tune.modules.metrics import TokenMetrics
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.optimization import Schedule, build_optimizer, optimizer_problems, schedule
from fine_tune.modules.precision import follow_precision
from fine_tune.modules.prediction import Predicting, write_answers
from fine_tune.modules.recomputing import Recomputing
from fine_tune.modules.row_losses import RowLosses
from fine_tune.modules.step_log import Throughput, log_step
from fine_tune.modules.together import stopping_together

log = logging.getLogger("fine_tune")


class StepModule(HuggingFaceModule):
    """Base of all modules: builds the model, and takes one optimizer step per batch.

    A subclass says what a batch costs: ``loss_count`` (the divisor), ``loss_sums`` of a micro-batch, and
    ``evaluate`` of one.

    Args:
        model_name_or_path: Model folder, or ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.
        from_config: Instead of a name, a new model with random weights: ``{model_type: llama, hidden_size: 64, ...}``
            or ``{class: LlamaConfig, ...}``. Vocabulary size and special ids default to the tokenizer's.
        config: Fields of the model's own config to replace, like ``{attention_dropout: 0.1}``.
        tokenizer: Folder or hub name of the tokenizer. None: the model's.
        dtype: Type of the weights in memory. auto: frozen weights under LoRA have the type of the trainer's precision
            (bf16-*: bfloat16, 16-*: float16), trained ones are float32; in 16 bit only under bf16-true and 16-true.
        attn_implementation: sdpa, eager, flex_attention ... None: the model's default.
        quantization: Load the frozen weights in 4 bit (nf4, fp4) or 8 bit (int8); needs ``lora``. Not needed for a
            checkpoint that bitsandbytes quantized already.
        lora: LoRA settings with peft's own names (r, lora_alpha, lora_dropout, target_modules ...), or auto: by the
            model's size, on all its linear layers. None: train all weights.
        lora_plus_ratio: Learning rate of LoRA's B matrices over that of its A matrices (LoRA+, arXiv 2402.12354; 16
            there, with a lower rate of A). None: the same.
        gradient_checkpointing: Recompute activations in the backward pass: about a third slower, far less memory.
            selective: keep what attention and every second matrix product gave. None: by the length of the training
            rows (longest above 4,000 or mean above 2,000 tokens). auto: only where memory asks for it (see ``plan``).
        offload_activations: Keep what the backward pass needs in the host's memory: the least of a GPU's, and slow.
        compile: Let torch compile the model's repeated blocks: up to a minute before the first step, then faster, the
            more so on a GPU. Results differ by rounding.
        optimizer: Any torch or bitsandbytes optimizer; matrices decay by its ``weight_decay``, vectors do not.
        lr_scheduler: Shape of the learning rate after warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        warmup_ratio: The same as a share of the run's steps; give one of the two.
    """

    def __init__(
        self,
        model_name_or_path: str | None = None,
        revision: str | None = None,
        from_config: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        quantization: Literal["nf4", "fp4", "int8"] | None = None,
        lora: LoraConfig | Literal["auto"] | None = None,
        lora_plus_ratio: float | None = None,
        gradient_checkpointing: Recomputing | None = None,
        offload_activations: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4),
        lr_scheduler: Schedule = "cosine",
        warmup_steps: int | None = None,
        warmup_ratio: float | None = None,
    ) -> None:
        settings = ModelSettings(
            model_name_or_path=model_name_or_path,
            revision=revision,
            from_config=from_config,
            config=config or {},
            tokenizer=tokenizer,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            head=self.head,
        )
        super().__init__(settings, compile=compile)
        problems = [
            *settings.problems(lora_plus_ratio),
            *warmup_problems(warmup_steps, warmup_ratio),
            *optimizer_problems(optimizer),
        ]
        if problems:
            raise UserError(*problems)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.lora_plus_ratio = lora_plus_ratio
        self.offload_activations = offload_activations
        self.warmup_steps, self.warmup_ratio = warmup_steps, warmup_ratio
        self.metrics: Any = TokenMetrics()
        self.row_losses = RowLosses()
        self.measured_rows: np.ndarray | None = (
            None  # [R, 3] of the last validation: id, count, loss
        )
        self.throughput = Throughput()
        self.intervals: dict[str, list[float]] = {}  # of 95 %, of what was measured last
        self.counted: dict[
            str, tuple[int, int]
        ] = {}  # shares of it that are counts: how many of how many
        self._grad_norm = torch.zeros(())
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

    step_metrics: tuple[str, ...] = ()  # what it measures of a training step beside its loss
    evaluation_metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    @property
    def can_generate(self) -> bool:
        """Whether its model writes answers."""
        return self.head == "lm"

    @abstractmethod
    def loss_count(self, batch: Any) -> int:
        """Return what the summed loss of the batch is divided by, for this rank's rows."""

    @abstractmethod
    def loss_sums(self, micro_batch: Any) -> tuple[Tensor, ...]:
        """Return the summed loss of a micro-batch, with its graph, and the sums of ``step_metrics``, without."""

    @abstractmethod
    def take_rows(self, batch: Any, rows: slice) -> Any:
        """Return the micro-batch that holds these rows of the batch."""

    @abstractmethod
    def evaluate(self, micro_batch: Any) -> None:
        """Add a micro-batch of an evaluation split to ``self.metrics``."""

    def loss_of_no_weight(self, micro_batch: Any) -> Tensor:
        """Take the forward passes of ``loss_sums`` or ``evaluate`` and count nothing; return 0, with its graph."""
        return self.loss_sums(micro_batch)[0] * 0.0

    @property
    def compares_rows(self) -> bool:
        """Whether each row's loss is kept: of the validation that makes a run's result, not of those while training."""
        return self.trainer.state.fn == "validate"

    def interval_metrics(self) -> dict[str, Tensor]:
        """Return what it counted besides, over all ranks; asked for where a row of ``metrics.csv`` is written."""
        return {}

    # ---- the model

    def setup(self, stage: str) -> None:
        self.check(self.plan, self.tokenizer)
        self.max_tokens_per_micro_batch = self.plan.max_tokens_per_micro_batch

    def check(self, plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hold the data against the model's config before weights load; raises what ``ModelSettings.check`` does."""
        self.model_settings.check(plan, tokenizer, self.num_warmup_steps(plan))

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer, self.named_parameters(), self.lora_plus_ratio)
        warmup, steps = self.num_warmup_steps(self.plan), self.plan.num_steps
        scheduler = schedule(optimizer, self.lr_scheduler, num_warmup_steps=warmup, num_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def num_warmup_steps(self, plan: DataPlan) -> int:
        """Return the optimizer steps of warm-up: as given, or the ratio of the run's steps rounded up."""
        if self.warmup_ratio is not None:
            return int(np.ceil(self.warmup_ratio * plan.num_steps))
        return self.warmup_steps or 0

    # ---- the step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take one optimizer step's gradients, again and again until they are usable, and log the step."""
        while True:
            gradient = self.gradients(batch)
            if gradient.failure is None:
                break
            self.handle(gradient.failure)
        self.throughput.add(gradient.num_tokens)
        log_step(self, gradient, self.throughput)
        return gradient.loss

    def gradients(self, batch: Any) -> StepGradient:
        """Compute the gradient of a step's rows, or say why it is of no use."""
        gradient = gradients(self, batch)
        self._grad_norm = gradient.norm
        return gradient

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

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Update the weights, undone and taken again where memory runs out."""
        step = partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        update(self, step)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward of a micro-batch; the detached loss that Lightning hands back has none."""
        if loss.requires_grad:
            loss.backward()

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients: ``training_step`` cleared them before its first micro-batch."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the step's gradient, unscaled and before clipping."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.log("grad_norm", self._grad_norm / (scaler.get_scale() if scaler is not None else 1.0))

    def on_train_start(self) -> None:
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            wrapped.require_backward_grad_sync = (
                False  # the step sums gradients once, after its last micro-batch
            )
        self.throughput.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step >= self.plan.num_steps:
            self.trainer.should_stop = True  # validate after the last step, whatever the interval

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

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["run_settings"] = step_settings(self)
        loop = checkpoint.get("loops", {}).get("fit_loop")
        if loop is not None:
            forget_failed_step(loop, checkpoint["global_step"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            follow_settings(self, checkpoint)
