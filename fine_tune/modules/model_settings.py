"""The settings that make a module's model, held against the data before its weights load."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fine_tune import adapters, model_config, saved_adapters
from fine_tune.batches import DataPlan
from fine_tune.errors import UserError
from fine_tune.models import Head
from fine_tune.modules.checks import (
    attention_problems,
    continued_adapter_problems,
    lora_problems,
    max_positions,
    plan_problems,
    score_head_problems,
    source_problems,
    stored_quantization_problems,
)
from fine_tune.modules.recomputing import Recomputing
from fine_tune.modules.tokenizer_check import tokenizer_problems


@dataclass
class ModelSettings:
    """Which model, and how it is loaded, quantized and adapted; the fields are documented where users set them.

    ``head`` is what the module puts on top. ``check`` fills in what was left to a rule: ``lora: auto``,
    ``gradient_checkpointing``; ``quantized``, as asked or as the checkpoint holds it; and ``continued_adapter``, the
    folder of an adapter that training goes on with, because its base is quantized and nothing can be merged into it.
    """

    model_name_or_path: str | None
    revision: str | None
    from_config: dict[str, Any] | None
    config: dict[str, Any]
    tokenizer: str | None
    dtype: str
    attn_implementation: str | None
    quantization: str | None
    lora: LoraConfig | Literal["auto"] | None
    gradient_checkpointing: Recomputing | None
    head: Head = "lm"
    quantized: str | None = field(init=False)
    continued_adapter: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.tokenizer = self.tokenizer or self.model_name_or_path
        self.quantized = self.quantization

    def problems(self, lora_plus_ratio: float | None) -> list[str]:
        """Say what does not go together."""
        return [
            *source_problems(
                self.model_name_or_path, self.from_config, self.quantization, self.lora
            ),
            *lora_problems(self.lora, lora_plus_ratio, self.quantization),
        ]

    def check(
        self, plan: DataPlan, tokenizer: PreTrainedTokenizerBase, num_warmup_steps: int
    ) -> None:
        """Hold the data against the model's config, and LoRA against its layers, before weights load.

        Raises:
            UserError: Rows longer than the model's positions, ids outside its vocabulary, another model's tokenizer,
                unknown LoRA targets, a warm-up longer than the planned epochs, or quantized weights that cannot be
                trained as asked.
        """
        config = self.resolved_config(tokenizer)
        problems = stored_quantization_problems(config, self.quantization, self.lora)
        problems += attention_problems(self.attn_implementation)
        problems += plan_problems(plan, config, num_warmup_steps)
        problems += tokenizer_problems(
            tokenizer, self.tokenizer, self.model_name_or_path, self.revision
        )
        problems += score_head_problems(config) if self.head == "score" else []
        self.take_stored(config)
        if self.continued_adapter is not None:
            problems += continued_adapter_problems(self.continued_adapter, self.lora)
        if problems:
            raise UserError(*problems)
        if self.continued_adapter is not None and self.lora == "auto":
            self.lora = saved_adapters.saved_lora(self.continued_adapter)
        if self.gradient_checkpointing is None:
            choice = plan.choices.get("model.gradient_checkpointing")
            self.gradient_checkpointing = choice is not None and bool(choice.value)
        if self.lora == "auto":
            self.lora = adapters.auto_lora(config)
        if self.lora is not None:
            adapters.check_lora(config, self.lora, self.head)

    def take_stored(self, config: PreTrainedConfig) -> None:
        """See how the weights are quantized, as asked or as stored, and whether an adapter goes on because of it."""
        self.quantized = self.quantization or model_config.stored_quantization(config)
        self.continued_adapter = self._adapter() if self.quantized else None

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The name and revision of the weights that load: of an adapter that training goes on with, its base's."""
        if self.continued_adapter is None:
            return self.model_name_or_path, self.revision
        return model_config.adapter_base(self.continued_adapter), None

    def _adapter(self) -> str | None:
        if self.model_name_or_path is None:
            return None
        key = "model.model_name_or_path"
        source, _ = model_config.resolve_source(key, self.model_name_or_path, self.revision)
        return source if model_config.adapter_base(source) is not None else None

    def max_positions(self, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
        """Return the longest row the model's positions allow, or None if its config sets no limit."""
        return max_positions(self.resolved_config(tokenizer))

    def vocabulary_size(self, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
        """Return how many words the model's logits choose from, or None if its config does not say."""
        config = self.resolved_config(tokenizer).get_text_config()
        return getattr(config, "vocab_size", None)

    def resolved_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
        """Return the model's config with the user's overrides; for a new model, the tokenizer's ids filled in."""
        fields = self.from_config
        if fields is not None and tokenizer is not None:
            ids = {
                name: getattr(tokenizer, name)
                for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
            fields = {"vocab_size": len(tokenizer), **ids, **fields}
        config = model_config.load_config(self.model_name_or_path, self.revision, fields)
        if self.head == "score":
            config.num_labels = 1
        return model_config.override_config(config, self.config)
