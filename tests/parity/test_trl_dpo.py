"""DPO gives the losses, rewards and log-probabilities of TRL's ``DPOTrainer``: same weights, rows and settings."""

import json
from collections.abc import Callable
from pathlib import Path

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
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fine_tune.data import PreferenceData
from fine_tune.modules import DPO

NUM_PAIRS, LEARNING_RATE = 48, 3e-4
MAX_DIFFERENCE = 1e-4  # relative; of anything below 0.01, 1e-6 absolute
# Rewards are 0.1 times the difference of two log-probabilities, which TRL sums in float32: their own resolution is
# 0.1 * 2^-23 * 30 for answers of up to 2 words, and 0.1 * 2^-23 * 300 for those of up to 30.
WORDS = 2
LONG, RESOLUTION_OF_LONG = "long", 4e-6
NAMES = {
    "train/loss": "loss",
    "train/rewards_chosen": "rewards/chosen",
    "train/rewards_rejected": "rewards/rejected",
    "train/rewards_accuracy": "rewards/accuracies",
    "train/rewards_margin": "rewards/margins",
    "train/logps_chosen": "logps/chosen",
    "train/logps_rejected": "logps/rejected",
}
CASES = [
    ("sigmoid", "full", []),
    ("ipo", "full", []),
    ("hinge", "full", []),
    ("robust", "full", ["--model.label_smoothing=0.1"]),
    ("apo_zero", "full", []),
    ("apo_down", "full", []),
    ("sigmoid", "lora", []),
    ("sigmoid", "full", ["--model.ld_alpha=0.5"]),
    ("sigmoid", LONG, []),
]


def write_pairs(file: Path, num_words: int) -> Path:
    chosen, rejected = make_rows(NUM_PAIRS, seed=3), make_rows(NUM_PAIRS, seed=4)

    def first_words(text: str) -> str:
        return " " + " ".join(text.split()[:num_words])

    lines = [
        {
            "prompt": c["prompt"],
            "chosen": first_words(c["completion"]),
            "rejected": first_words(r["completion"]) + " lain",
        }
        for c, r in zip(chosen, rejected, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("loss", "trained", "more"), CASES, ids=[f"{a}-{b}{'-more' if c else ''}" for a, b, c in CASES]
)
def test_losses_rewards_and_logps_equal_those_of_trl(
    loss: str,
    trained: str,
    more: list[str],
    small_model: Callable[[str], Path],
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_model("llama")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30 if trained == LONG else WORDS)
    adapter = _random_adapter(folder) if trained == "lora" else None
    data = PreferenceData(
        path=str(pairs),
        split="none",
        batch_size=BATCH_SIZE,
        cache_dir=str(root / "lightning_logs" / ".cache"),
        tokenizer=str(folder),
    )
    rows, order = rows_in_our_order(data)
    theirs = _their_trainer(folder, pairs, order, loss, more, adapter, root)
    _assert_same_tokens(rows, theirs.train_dataset)
    theirs.train()

    run = _our_run(folder, pairs, root, loss, more, adapter, monkeypatch)
    logged = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(logged) == NUM_STEPS
    worst = {}
    for ours, name in NAMES.items():
        expected = np.array([entry[name] for entry in logged])
        found = np.array(run.column(ours))
        if name == "rewards/accuracies" and adapter is None:
            expected, found = expected[2:], found[2:]  # the first rate is 0, so all rewards are
        floor = 1e-6 / MAX_DIFFERENCE
        if trained == LONG and ours.startswith("train/rewards"):
            floor = RESOLUTION_OF_LONG / MAX_DIFFERENCE
        difference = np.abs(found - expected) / np.maximum(np.abs(expected), floor)
        worst[ours] = float(np.max(difference))
    print(f"\n{loss} {trained} {more}: {worst}; loss {logged[0]['loss']} -> {logged[-1]['loss']}")
    assert logged[0]["loss"] != pytest.approx(logged[-1]["loss"], rel=1e-3)  # it learned something
    assert max(worst.values()) < MAX_DIFFERENCE


def _their_trainer(
    folder: Path,
    file: Path,
    order: np.ndarray,
    loss: str,
    more: list[str],
    adapter: dict[str, torch.Tensor] | None,
    root: Path,
) -> DPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changed = dict(part.removeprefix("--model.").split("=") for part in more)
    config = DPOConfig(
        **their_settings(
            root,
            loss_type=[loss],
            beta=0.1,
            label_smoothing=float(changed.get("label_smoothing", 0.0)),
            ld_alpha=float(changed["ld_alpha"]) if "ld_alpha" in changed else None,
            max_length=None,
            learning_rate=LEARNING_RATE,
            disable_dropout=False,
        )
    )
    lora = LoraConfig(**PREFERENCE_LORA, task_type="CAUSAL_LM") if adapter is not None else None
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=their_rows(file, order),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora,  # given as a PeftModel, its adapter would be the reference
    )
    if adapter is not None:
        set_peft_model_state_dict(trainer.model, adapter)
    return trainer


def _assert_same_tokens(ours: Dataset, theirs: Dataset) -> None:
    assert len(theirs) == len(ours) == NUM_STEPS * BATCH_SIZE
    for mine, other in zip(ours, theirs, strict=True):
        prompt, chosen = mine["num_prompt"], mine["num_prompt"] + mine["num_chosen"]
        assert list(other["prompt_ids"]) == mine["input_ids"][:prompt]
        assert list(other["chosen_ids"]) == mine["input_ids"][prompt:chosen]
        assert list(other["rejected_ids"]) == mine["input_ids"][chosen:]


def _our_run(
    folder: Path,
    file: Path,
    root: Path,
    loss: str,
    more: list[str],
    adapter: dict[str, torch.Tensor] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    line = ["--model=fine_tune.modules.DPO", "--data=fine_tune.data.PreferenceData", *more]
    line = [*line, f"--model.loss={loss}", f"--model.optimizer.lr={LEARNING_RATE}"]
    if adapter is not None:
        line += [f"--model.lora.{key}={value}" for key, value in PREFERENCE_LORA.items()]
        configure_model = DPO.configure_model

        def configure_with_adapter(module: DPO) -> None:
            configure_model(module)
            set_peft_model_state_dict(module.model, adapter)

        monkeypatch.setattr(DPO, "configure_model", configure_with_adapter)
    return run_ours("fit", root, folder, file, *line)


def _random_adapter(folder: Path) -> dict[str, torch.Tensor]:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**PREFERENCE_LORA)
    )
    torch.manual_seed(11)
    adapter = get_peft_model_state_dict(model)
    return {name: 0.05 * torch.randn_like(value) for name, value in adapter.items()}
