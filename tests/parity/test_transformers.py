"""Pretraining beside transformers' Trainer: the same weights and rows, 20 steps, dense and mixture of experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_runs import (
    BATCH_SIZE,
    NUM_STEPS,
    make_rows,
    max_relative,
    relative_l2,
    run_ours,
    their_settings,
    weights_of,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fine_tune.data import TextData

LOSS_BOUND, WEIGHTS_BOUND = 1e-5, 1e-4
MAX_LENGTH = 48


class Recording(Trainer):
    """transformers' Trainer, its losses and auxiliary losses kept as they are computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.balance_losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
        self.losses.append(float(loss))
        if outputs.get("aux_loss") is not None:
            self.balance_losses.append(float(outputs["aux_loss"]))
        return loss


@pytest.fixture(scope="session")
def texts(root: Path) -> Path:
    """Documents shorter than a row: some rows hold several."""
    rows = [{"text": row["prompt"]} for row in make_rows(400, seed=5)]
    file = root / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3_moe"])
def test_twenty_steps_give_the_losses_and_weights_of_transformers(
    architecture: str, root: Path, small_model: Callable[[str], Path], texts: Path
) -> None:
    folder = small_model(architecture)
    ours = run_ours(
        "fit",
        root,
        folder,
        texts,
        "--model=fine_tune.modules.Pretrain",
        "--data=fine_tune.data.TextData",
        f"--data.max_length={MAX_LENGTH}",
        "--data.max_tokens_per_micro_batch=100000",  # a step at once: the balance is one of its tokens
        f"--model.model_name_or_path={folder}",
        f"--data.path={texts}",
        "--data.split=none",
        f"--data.batch_size={BATCH_SIZE}",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if architecture == "qwen3_moe":
        model.config.output_router_logits = True
    settings = their_settings(root, per_device_train_batch_size=1)
    theirs = Recording(
        model,
        TrainingArguments(**settings),
        train_dataset=_batches(folder, texts, root),
        data_collator=lambda features: features[0],
    )
    theirs.train()
    assert max_relative(ours.column("train/loss"), theirs.losses) < LOSS_BOUND
    assert theirs.losses[-1] < theirs.losses[0]
    if architecture == "qwen3_moe":
        assert len(theirs.balance_losses) == NUM_STEPS
        balance = ours.column("train/balance_loss")
        assert max_relative(balance, theirs.balance_losses) < LOSS_BOUND
    expected = {name: value.detach() for name, value in model.named_parameters()}
    assert relative_l2(weights_of(ours.checkpoint), expected) < WEIGHTS_BOUND


def _batches(model: Path, texts: Path, root: Path) -> list[dict[str, torch.Tensor]]:
    """Return the rows of our steps, as their model takes them."""
    data = TextData(
        str(texts),
        tokenizer=str(model),
        split="none",
        max_length=MAX_LENGTH,
        batch_size=BATCH_SIZE,
        epochs=4,
        cache_dir=str(root / "lightning_logs" / ".cache"),
    )
    data.prepare_data()
    data.setup("fit")
    batches = []
    for _, batch in zip(range(NUM_STEPS), data.train_dataloader(), strict=False):
        lengths_B1 = torch.tensor(batch["lengths"])[:, None]
        labels_BT = batch["labels_BT"].clone()
        labels_BT[:, 0] = -100  # they count it among the tokens that are predicted
        batches.append(
            {
                "input_ids": batch["input_ids_BT"],
                "labels": labels_BT,
                "attention_mask": (torch.arange(labels_BT.shape[1]) < lengths_B1).long(),
            }
        )
    assert any(len(set(batch["attention_mask"].sum(1).tolist())) > 1 for batch in batches)
    return batches
