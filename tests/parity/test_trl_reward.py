"""A reward model has the losses, rewards and gradients of TRL's ``RewardTrainer``: same weights, rows and settings."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from parity_runs import (
    BATCH_SIZE,
    NUM_STEPS,
    PREFERENCE_LORA,
    Run,
    make_rows,
    rows_in_our_order,
    run_ours,
    their_rows,
    their_settings,
    write_rows,
)
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from fine_tune.data import PreferenceData
from fine_tune.modules import Reward

NUM_PAIRS, LEARNING_RATE, CLIP = 48, 3e-4, 0.5
WEIGHT_DECAY = 0.5  # so much that within 20 steps it shows which weights decay
MAX_LOSS_DIFFERENCE = 1e-5  # relative
MAX_DIFFERENCE = 1e-4  # relative; of a value below 0.01, 1e-6 absolute
NAMES = {
    "train/loss": "loss",
    "train/rewards_accuracy": "accuracy",
    "train/rewards_margin": "margin",
    "train/rewards_mean": "mean_reward",
    "grad_norm": "grad_norm",
}
CASES = [
    ("full", 0.0, False),
    ("lora", 0.0, False),
    ("full", 0.01, False),
    ("full", 0.0, True),
]


@pytest.fixture(scope="module")
def scored(small_model: Callable[[str], Path], root: Path) -> Path:
    """Return the folder of the small Llama with a scalar head, which both sides load."""
    base, folder = small_model("llama"), root / "llama_with_score"
    torch.manual_seed(9)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    assert model.config.pad_token_id is not None  # by which TRL finds an answer's last token
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("trained", "center", "with_margin"),
    CASES,
    ids=[f"{a}{'-center' if b else ''}{'-margin' if c else ''}" for a, b, c in CASES],
)
def test_losses_rewards_and_gradients_equal_those_of_trl(
    trained: str,
    center: float,
    with_margin: bool,
    scored: Path,
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", _make_pairs(with_margin))
    data = PreferenceData(
        path=str(pairs),
        split="none",
        batch_size=BATCH_SIZE,
        cache_dir=str(root / "lightning_logs" / ".cache"),
        tokenizer=str(scored),
    )
    rows, order = rows_in_our_order(data)
    theirs = _their_trainer(scored, pairs, order, trained, center, root)
    _assert_same_rows(rows, theirs.train_dataset, with_margin)
    decayed = theirs.get_decay_parameter_names(theirs.model)
    assert any("score" in name for name in decayed)
    theirs.train()

    run = _our_run(scored, pairs, root, trained, center, monkeypatch)
    logged = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(logged) == NUM_STEPS
    worst = {}
    for ours, name in NAMES.items():
        expected, found = np.array([entry[name] for entry in logged]), _column(run, ours)
        difference = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-2)
        worst[ours] = float(np.max(difference))
    norms = [entry["grad_norm"] for entry in logged]
    print(
        f"\n{trained} center {center} margin {with_margin}: {worst}; loss {logged[0]['loss']} -> "
        f"{logged[-1]['loss']}, margin {logged[0]['margin']} -> {logged[-1]['margin']}, "
        f"mean {logged[0]['mean_reward']} -> {logged[-1]['mean_reward']}, "
        f"grad_norm {min(norms):.2f} to {max(norms):.2f}"
    )
    assert logged[-1]["loss"] < 0.95 * logged[0]["loss"]  # it learned something
    assert max(norms) > CLIP  # clipping had something to do
    assert worst["train/loss"] < MAX_LOSS_DIFFERENCE
    assert all(value < MAX_DIFFERENCE for value in worst.values()), worst


def _make_pairs(with_margin: bool) -> list[dict[str, Any]]:
    rng = random.Random(5)
    chosen, rejected = make_rows(NUM_PAIRS, seed=3), make_rows(NUM_PAIRS, seed=4)
    return [
        {
            "prompt": c["prompt"],
            "chosen": c["completion"],
            "rejected": r["completion"] + " lain",
            **({"margin": round(rng.uniform(-0.5, 2), 2)} if with_margin else {}),
        }
        for c, r in zip(chosen, rejected, strict=True)
    ]


def _their_trainer(
    folder: Path,
    file: Path,
    order: np.ndarray,
    trained: str,
    center: float,
    root: Path,
) -> RewardTrainer:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    config = RewardConfig(
        **their_settings(
            root,
            center_rewards_coefficient=center or None,
            max_length=None,
            max_grad_norm=CLIP,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            disable_dropout=False,
        )
    )
    trainer = RewardTrainer(
        model,
        args=config,
        train_dataset=their_rows(file, order),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**PREFERENCE_LORA, modules_to_save=["score"])
        if trained == "lora"
        else None,
    )
    if trained == "lora":
        _fill_adapter(trainer.model)
    return trainer


def _assert_same_rows(ours: Dataset, theirs: Dataset, with_margin: bool) -> None:
    assert len(theirs) == len(ours) == NUM_STEPS * BATCH_SIZE
    for mine, other in zip(ours, theirs, strict=True):
        prompt, chosen = mine["num_prompt"], mine["num_prompt"] + mine["num_chosen"]
        ids = mine["input_ids"]
        assert list(other["chosen_ids"]) == ids[:chosen]
        assert list(other["rejected_ids"]) == ids[:prompt] + ids[chosen:]
        assert ("margin" in other) == with_margin
        assert other.get("margin", 0.0) == mine["margin"]


def _our_run(
    folder: Path,
    file: Path,
    root: Path,
    trained: str,
    center: float,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    line = ["--model=fine_tune.modules.Reward", "--data=fine_tune.data.PreferenceData"]
    line += [f"--model.center_rewards={center}", f"--trainer.gradient_clip_val={CLIP}"]
    line += [f"--model.optimizer.lr={LEARNING_RATE}"]
    line += [f"--model.optimizer.weight_decay={WEIGHT_DECAY}"]
    if trained == "lora":
        line += [f"--model.lora.{key}={value}" for key, value in PREFERENCE_LORA.items()]
        configure_model = Reward.configure_model

        def configure_with_adapter(module: Reward) -> None:
            configure_model(module)
            _fill_adapter(module.model)

        monkeypatch.setattr(Reward, "configure_model", configure_with_adapter)
    return run_ours("fit", root, folder, file, *line)


def _column(run: Run, name: str) -> np.ndarray:
    """Read a column; TRL knows the mean over both answers, and ours keeps them apart."""
    if name == "train/rewards_mean":
        both = [run.column(f"train/rewards_{answer}") for answer in ("chosen", "rejected")]
        return np.mean(both, axis=0)
    return np.array(run.column(name))


def _fill_adapter(model: Any) -> None:
    """Make all matrices of an adapter random, so that each has a gradient; the scalar head stays the folder's."""
    generator = torch.Generator().manual_seed(11)
    matrices = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    for name in sorted(matrices):
        torch.nn.init.normal_(matrices[name], std=0.05, generator=generator)
