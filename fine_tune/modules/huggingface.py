"""A LightningModule around a Hugging Face model: its weights, loaded once, and on their way to and from checkpoints."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fine_tune.batches import DataPlan, data_of, plan_of
from fine_tune.device_memory import memory_of
from fine_tune.models import Head
from fine_tune.modules.compiling import compile_blocks, repeated_blocks
from fine_tune.modules.lm_head import LogitChunks
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.seeding import seed_all
from fine_tune.modules.weights import (
    export,
    load_weights,
    own_trained,
    restore_weights,
    weights_to_keep,
)
from fine_tune.shards import is_sharded, whole_state

log = logging.getLogger("fine_tune")


class HuggingFaceModule(LightningModule):
    """What a module is before it knows how to train: a model, its tokenizer, and its part of a checkpoint.

    Args:
        settings: Which model, and how it is loaded.
        compile: Let torch compile the model's repeated blocks.
    """

    head: Head = "lm"  # what its model has on top

    def __init__(self, settings: ModelSettings, *, compile: bool) -> None:
        super().__init__()
        self.model_settings, self.is_compiled = settings, compile
        # weights travel as Hugging Face files, restored in on_load_checkpoint
        self.strict_loading = False
        self.model: PreTrainedModel | PeftModel | None = None
        self.logit_chunks = LogitChunks()
        self.starts_from_checkpoint = False  # the command line knows before Lightning tells

    @property
    def seed(self) -> int:
        """The run's seed for weights, dropout and the like."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The data module's, which is the model's."""
        return data_of(self.trainer).tokenizer

    @property
    def plan(self) -> DataPlan:
        """What the data module planned for this run."""
        return plan_of(self.trainer)

    # ---- weights

    def configure_model(self) -> None:
        """Load or initialise the weights, once; full weights of a checkpoint come with it, and from nowhere else."""
        if self.model is None and not self._awaits_checkpoint:
            self._load()

    @property
    def _awaits_checkpoint(self) -> bool:
        """Whether a checkpoint brings all weights as soon as the model is configured."""
        later = self.trainer.strategy.restore_checkpoint_after_setup
        return self.starts_from_checkpoint and self.model_settings.lora is None and not later

    def _load(self, checkpoint: Path | None = None) -> None:
        seed_all(self.seed, "weights")
        precision = str(self.trainer.precision)
        self.model = load_weights(self.model_settings, self.tokenizer, precision, checkpoint)
        memory = memory_of(self.trainer.strategy.root_device).total()
        self.logit_chunks = LogitChunks(self.model.config, memory)
        if self.trainer.state.fn == "fit":
            if self.trainer.strategy.root_device.type == "cpu":
                own_trained(self.model)
            if self.is_compiled:
                compile_blocks(self.model)
            total, trained = self.num_weights()
            share = "weights: %s, %s of them trained (%.2f %%)"
            log.info(share, f"{total:,}", f"{trained:,}", 100 * trained / total)

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The model's repeated blocks, in which most of its weights lie."""
        assert self.model is not None
        return repeated_blocks(self.model)

    def num_weights(self) -> tuple[int, int]:
        """Count the model's weights, and those of them that are trained."""
        assert self.model is not None
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return int(self.model.num_parameters()), trained

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was trained and whole adapters, under the Hugging Face model's own names."""
        kept = weights_to_keep(self, checkpoint["state_dict"])
        checkpoint["state_dict"] = whole_state(kept, keep=self.trainer.is_global_zero)

    def export(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """Write weights, config and tokenizer as a folder that any Hugging Face tool opens."""
        assert self.model is not None
        export(self.model, self.tokenizer, folder, state_dict, self.head)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the weights of the checkpoint's folder into the model.

        Raises:
            UserError: The folder holds another kind of weights, or an adapter of another base or shape.
        """
        folder = Path(checkpoint["folder"])
        if is_sharded(self.model):  # whole again, from the checkpoint; the strategy cuts it anew
            self.model = None
            if self.model_settings.lora is not None:
                self._load()
        if self.model is None:
            self._load(folder)
        else:
            restore_weights(self.model, self.model_settings, folder)
