"""Pretraining: the NLL of every token of a text but its first, per token; measured per byte of text, too."""

from typing import Any

from fine_tune.modules.metrics import ByteMetrics
from fine_tune.modules.sft import SFT


class Pretrain(SFT):
    __doc__ = (SFT.__doc__ or "").replace(
        "Supervised fine-tuning of a causal language model, all weights or LoRA.",
        "Training of a causal language model on texts, from nothing or further.",
    )

    evaluation_metrics = ("loss", "perplexity", "bits_per_byte", "token_accuracy")

    def __init__(self, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(model_name_or_path=model_name_or_path, **kwargs)
        self.metrics = ByteMetrics()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._count_bytes("validation")

    def on_test_epoch_start(self) -> None:
        self._count_bytes("test")

    def _count_bytes(self, split: str) -> None:
        num_bytes = self.plan.num_bytes.get(split)  # none of data that are no texts
        if num_bytes:
            self.metrics.tokens_per_byte = self.plan.num_supervised[split] / num_bytes
