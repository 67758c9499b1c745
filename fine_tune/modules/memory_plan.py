"""What a training step of a module will take of a device's memory, by term, before anything is loaded.

Shape letters: B rows, T tokens, V vocabulary.
"""

import copy
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fine_tune.memory import (
    LiveBytes,
    as_if_loaded,
    bytes_held,
    model_without_values,
    without_values,
    without_values_of,
)
from fine_tune.modules.lm_head import LogitChunks
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.optimizer_state import bytes_of_state
from fine_tune.modules.precision import precision_dtype, weights_dtype
from fine_tune.modules.weights import adapted

if TYPE_CHECKING:
    from fine_tune.modules.base import StepModule

DEPTHS = (2, 4)  # layers of the models that are tried in place of a deeper one
CUDA_CONTEXT = 500 * 2**20  # of the driver and its libraries; differs by GPU and version


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step when it takes the most.

    Args:
        weights: Of the model and its adapters, as they lie in memory; buffers too.
        gradients: Of what is trained.
        optimizer: Its state.
        activations: What the backward pass needs, and what is being computed.
        logits: Of the vocabulary's size: logits, their gradient, copies in float32.
        attention: Of the size T x T: masks, scores where attention makes them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    attention: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


class MemoryPlanner:
    """Finds what a step takes, for the model as set or with other adapters, quantization and checkpointing.

    Args:
        module: Built and checked; it has no model.
        tokenizer: The model's.
        precision: The trainer's.
        memory: Bytes of the device, by which logits are chunked; None: they are not.
    """

    def __init__(
        self,
        module: "StepModule",
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        memory: int | None = None,
    ) -> None:
        self.module, self.precision = module, precision
        self.config = module.model_settings.resolved_config(tokenizer)
        self.memory = memory
        self._states: dict[str, tuple[int, int, int]] = {}
        self._found: dict[str, StepMemory] = {}

    def at_once(self, settings: ModelSettings, batch: Any, rows: int) -> StepMemory:
        """Return what a step takes when it is the most.

        Args:
            settings: How the model is loaded, quantized and adapted.
            batch: The step's rows, longest first.
            rows: Of a micro-batch; with fewer than the step has, gradients are there when the next is computed.
        """
        how = settings.gradient_checkpointing or False
        key = repr((settings.lora, settings.quantized, how, batch["lengths"], rows))
        if key not in self._found:
            self._found[key] = self._at_once(settings, batch, rows)
        return self._found[key]

    def _at_once(self, settings: ModelSettings, batch: Any, rows: int) -> StepMemory:
        micro_batch = self.module.take_rows(batch, slice(0, rows))
        accumulates = rows < len(batch["lengths"])
        weights, gradients, optimizer = self._state(settings)
        depth = int(self.config.get_text_config().num_hidden_layers)
        tried = DEPTHS if depth > DEPTHS[1] and _alike(self.config) else (depth,)
        found = [
            self._working(self._of_depth(layers), settings, micro_batch, accumulates)
            for layers in tried
        ]
        working = found[0]
        if len(found) == 2:  # each further layer takes as much as the last
            more = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
            kinds = {*found[0], *found[1]}
            working = Counter(
                {k: round(found[0][k] + more * (found[1][k] - found[0][k])) for k in kinds}
            )
        return StepMemory(
            weights,
            gradients,
            optimizer,
            working["activations"],
            working["logits"],
            working["attention"],
        )

    def _state(self, settings: ModelSettings) -> tuple[int, int, int]:
        """Return the bytes of weights, gradients and optimizer of the model in its full depth."""
        key = repr((settings.lora, settings.quantized))
        if key not in self._states:
            model = self._model(self.config, settings)
            with without_values():
                as_if_loaded(model)
                held = bytes_held([*model.parameters(), *model.buffers()])
                trained = [p for p in model.parameters() if p.requires_grad]
                gradients = sum(p.nbytes for p in trained)
                state = bytes_of_state(self.module, trained)
                self._states[key] = held, gradients, state
        return self._states[key]

    def _working(
        self,
        config: PreTrainedConfig,
        settings: ModelSettings,
        micro_batch: Any,
        accumulates: bool,
    ) -> Counter[str]:
        """Return the bytes of all that is neither weights, gradients nor optimizer, when it is the most."""
        labels_BT = micro_batch["labels_BT"]
        vocabulary, lengths = config.get_text_config().vocab_size, set(labels_BT.shape[1:])

        def kind_of(tensor: Tensor) -> str:
            if tensor.ndim > 1 and tensor.shape[-1] == vocabulary:
                return "logits"
            square = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]
            return "attention" if square and tensor.shape[-1] in lengths else "activations"

        module, model = copy.copy(self.module), self._model(config, settings)
        with without_values() as mode:
            as_if_loaded(model)
            module._modules = {}
            module.model = model
            module.logit_chunks = LogitChunks(config, self.memory, checked=True)
            batch = without_values_of(micro_batch, mode)
            live = LiveBytes([*model.parameters(), *model.buffers()], kind_of)
            with live:
                for _ in range(2 if accumulates else 1):
                    live.start_peak()
                    with self._computing():
                        loss = module.loss_sums(batch)[0]
                    loss.backward()
                    del loss
            gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        working = Counter(live.at_peak)
        working["activations"] = max(0, working["activations"] - gradients)
        return working

    def _model(self, config: PreTrainedConfig, settings: ModelSettings) -> Any:
        dtype = weights_dtype(settings.dtype, self.precision, frozen=settings.lora is not None)
        model = model_without_values(
            config,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            quantization=settings.quantized,
            compute_dtype=precision_dtype(self.precision) or dtype,
            head=settings.head,
        )
        with torch.device("meta"):
            return adapted(model, _without_values_of_lora(settings), self.precision).train()

    def _of_depth(self, layers: int) -> PreTrainedConfig:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        return config

    def _computing(self) -> Any:
        dtype = precision_dtype(self.precision)
        mixed = self.precision.endswith("mixed") and dtype is not None
        return torch.autocast("cpu", dtype=dtype, enabled=mixed)


def _without_values_of_lora(settings: ModelSettings) -> ModelSettings:
    """Let adapters start anyhow: some beginnings are computed from the weights' values."""
    if settings.lora is None:
        return settings
    lora = copy.deepcopy(settings.lora)
    lora.init_lora_weights = True  # type: ignore[union-attr]
    plain = replace(settings, lora=lora)
    plain.quantized = settings.quantized
    return plain


def _alike(config: PreTrainedConfig) -> bool:
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    return len(set(kinds)) == 1
