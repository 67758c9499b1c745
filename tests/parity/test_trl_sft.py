"""The same supervised fine-tuning as TRL's ``SFTTrainer``, step by step and in the weights at the end."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from parity_runs import (
    BATCH_SIZE,
    CLIP,
    NUM_ROWS,
    NUM_STEPS,
    Run,
    max_relative,
    relative_l2,
    rows_in_our_order,
    run_ours,
    their_rows,
    their_settings,
    weights_of,
)
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fine_tune.data import SFTData
from fine_tune.modules import SFT

MAX_LOSS_DIFFERENCE = 1e-5  # relative, at every step
MAX_WEIGHT_DIFFERENCE = 1e-4  # relative L2 over all trained parameters after the last step
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}
OUR_MICRO_BATCH = {1: None, 4: 128}  # their accumulation -> our padded tokens per micro-batch

ALL = list(product(("llama", "phi", "qwen2"), ("full", "lora"), ("masked", "unmasked"), (1, 4)))
FAST = {
    *(case for case in ALL if case[0] == "llama"),
    ("phi", "full", "masked", 4),
    ("qwen2", "lora", "unmasked", 1),
}


class RecordingTrainer(SFTTrainer):
    """TRL's trainer, which keeps the loss of every optimizer step unrounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        steps = self.__dict__.setdefault("step_losses", {})
        steps[self.state.global_step] = steps.get(self.state.global_step, 0.0) + float(loss)
        return loss


@pytest.mark.parametrize(
    ("architecture", "trained", "supervised", "accumulation"),
    [
        pytest.param(
            *case, marks=() if case in FAST else pytest.mark.slow, id="-".join(map(str, case))
        )
        for case in ALL
    ],
)
def test_losses_and_weights_equal_those_of_trl(
    architecture: str,
    trained: str,
    supervised: str,
    accumulation: int,
    small_model: Callable[[str], Path],
    prompt_rows: Path,
    text_rows: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, lora = small_model(architecture), trained == "lora"
    file = prompt_rows if supervised == "masked" else text_rows
    adapter = _random_adapter(folder) if lora else None

    rows, order = _our_rows_in_our_order(folder, file, root)
    theirs = _their_trainer(folder, file, order, accumulation, adapter, root)
    _assert_same_tokens(rows, theirs.train_dataset)

    run = _our_run(folder, file, root, accumulation, adapter, monkeypatch)
    theirs.train()

    losses = max_relative(run.column("train/loss"), list(theirs.step_losses.values()))
    start, ours, end = _weights(folder, run, theirs.model, adapter)
    weights, moved = relative_l2(ours, end), relative_l2(end, start)
    norms = run.column("grad_norm")
    print(
        f"\n{architecture} {trained} {supervised} accumulation {accumulation}: loss {losses:.1e}, "
        f"weights {weights:.1e} (moved {moved:.2f}), loss {theirs.step_losses[0]:.2f} -> "
        f"{theirs.step_losses[NUM_STEPS - 1]:.2f}, grad_norm {min(norms):.2f} to {max(norms):.2f}"
    )
    assert len(theirs.step_losses) == NUM_STEPS
    assert moved > 100 * MAX_WEIGHT_DIFFERENCE
    assert max(norms) > CLIP  # clipping had something to do
    assert losses < MAX_LOSS_DIFFERENCE
    assert weights < MAX_WEIGHT_DIFFERENCE


def _our_rows_in_our_order(folder: Path, file: Path, root: Path) -> tuple[Dataset, np.ndarray]:
    data = SFTData(
        path=str(file),
        split="none",
        batch_size=BATCH_SIZE,
        cache_dir=str(root / "lightning_logs" / ".cache"),
        tokenizer=str(folder),
    )
    lengths = [len(ids) for ids in data.rows("train")["input_ids"]]
    assert len(lengths) == NUM_ROWS and max(lengths) > 8 * min(lengths)
    return rows_in_our_order(data)


def _assert_same_tokens(ours: Dataset, theirs: Dataset) -> None:
    assert len(theirs) == NUM_STEPS * BATCH_SIZE
    assert list(theirs["input_ids"]) == list(ours["input_ids"])
    assert list(theirs["labels"]) == list(ours["labels"])


def _their_trainer(
    folder: Path,
    file: Path,
    order: np.ndarray,
    accumulation: int,
    adapter: dict[str, Tensor] | None,
    root: Path,
) -> RecordingTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        set_peft_model_state_dict(model, adapter)
    config = SFTConfig(
        **their_settings(
            root,
            per_device_train_batch_size=BATCH_SIZE // accumulation,
            gradient_accumulation_steps=accumulation,
            completion_only_loss="prompt" in file.read_text().splitlines()[0],
            logging_strategy="no",
        )
    )
    return RecordingTrainer(
        model,
        args=config,
        train_dataset=their_rows(file, order),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def _our_run(
    folder: Path,
    file: Path,
    root: Path,
    accumulation: int,
    adapter: dict[str, Tensor] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    more = [f"--data.max_tokens_per_micro_batch={OUR_MICRO_BATCH[accumulation] or 'null'}"]
    if adapter is not None:
        more += [f"--model.lora.{key}={value}" for key, value in LORA.items()]
        configure_model = SFT.configure_model

        def configure_with_adapter(module: SFT) -> None:
            configure_model(module)
            set_peft_model_state_dict(module.model, adapter)

        monkeypatch.setattr(SFT, "configure_model", configure_with_adapter)
    return run_ours("fit", root, folder, file, *more)


def _random_adapter(folder: Path) -> dict[str, Tensor]:
    """Make an adapter whose two matrices are both random, so that both have a gradient from the first step."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    torch.manual_seed(11)
    adapter = get_peft_model_state_dict(model)
    return {name: 0.05 * torch.randn_like(value) for name, value in adapter.items()}


def _weights(
    folder: Path, run: Run, their_model: Any, adapter: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained weights at the start, of our checkpoint, and of their model."""
    if adapter is not None:
        ours = load_peft_weights(str(run.checkpoint), device="cpu")
        return adapter, ours, get_peft_model_state_dict(their_model)
    theirs = {name: value.detach() for name, value in their_model.named_parameters()}
    return weights_of(folder), weights_of(run.checkpoint), theirs
