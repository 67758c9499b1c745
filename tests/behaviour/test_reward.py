"""Reward models on small real models: what is learned, where it is read, and that any Hugging Face tool opens them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TOKENIZER, CommandLine, write_rows
from lora_runs import STOP
from peft import PeftModel
from preference_runs import LORA, losses, weights
from processes import TWO, start
from small_models import save_small_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fine_tune.modules.pairs import can_share
from fine_tune.modules.reward import _last_hidden

QLORA = ["--model.quantization", "nf4", "--model.lora", "auto"]


@pytest.mark.parametrize("trained", [[], LORA, QLORA], ids=["full", "lora", "qlora"])
def test_a_reward_model_learns_which_answer_is_better_and_goes_on_bit_for_bit(
    command_line: CommandLine, reward_args: list[str], trained: list[str]
) -> None:
    args = [*reward_args, *trained, "--data.epochs", "4", "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight", "--test_at_end", "true")
    curve = losses(straight, "straight")
    assert curve[0] == pytest.approx(math.log(2), abs=0.3) and curve[-1] < curve[0]
    record = straight.run("straight").read()
    validated, tested = record["results"]
    assert validated["metrics"]["val/rewards_accuracy"] > 0.6
    assert {"test/loss", "test/rewards_accuracy_low"} <= tested["metrics"].keys()
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *STOP, "5")
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert losses(resumed) == losses(straight, "straight")
    ours, theirs = weights(resumed, "run"), weights(straight, "straight")
    assert ours.keys() == theirs.keys() and any("score" in name for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_prefix_sharing_micro_batches_and_processes_change_nothing(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path
) -> None:
    shared = losses(command_line("fit", *reward_args, "--model.prefix_sharing", "true"))
    for name, more in {
        "unshared": ["--model.prefix_sharing", "false"],
        "small": ["--data.max_tokens_per_micro_batch", "40"],
    }.items():
        other = command_line("fit", *reward_args, *more, "--name", name)
        assert losses(other, name) == pytest.approx(shared, rel=1e-5)
    process = start([*reward_args, *TWO, "--name", "together"], tmp_path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert losses(other, "together") == pytest.approx(shared, rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "pad"),
    [
        ("llama", "<pad>"),
        ("gpt2", "<pad>"),
        ("phi", "<pad>"),
        ("qwen2", "<pad>"),
        ("llama", "<eos>"),
    ],
)
def test_a_saved_reward_model_scores_in_transformers_as_in_training(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path, architecture: str, pad: str
) -> None:
    fields: dict[str, Any] = {"num_key_value_heads": 2}
    if architecture == "gpt2":  # which trains with dropout by default
        fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    save_small_model(tmp_path / "model", architecture, **fields)
    for name in ("tokenizer_config.json", "config.json"):
        file = tmp_path / "model" / name
        pads = {"pad_token": pad} if name[0] == "t" else {"pad_token_id": int(pad == "<eos>")}
        file.write_text(json.dumps({**json.loads(file.read_text()), **pads}))
    model = ["--model.model_name_or_path", str(tmp_path / "model"), "--data.split", "none"]
    outcome = command_line("fit", *reward_args, *model, "--data.batch_size", "50")
    assert outcome.code == 0, outcome.err
    best = outcome.run().checkpoint("last")
    opened: Any = AutoModelForSequenceClassification.from_pretrained(best).eval()
    tokenizer = AutoTokenizer.from_pretrained(best)
    again = ["--model.model_name_or_path", str(best), "--model.optimizer.lr", "0"]
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]

    def rewards(name: str) -> torch.Tensor:
        texts = [row["prompt"] + row[name] + tokenizer.eos_token for row in rows]
        with torch.no_grad():  # all at once: where a row ends is found by the pad token
            inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            return opened(**inputs).logits[:, 0].double()

    margins = (rewards("chosen") - rewards("rejected")).tolist()
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    more = ["--model.optimizer.lr", "1e-9", "--trainer.max_steps", "1", "--name", "again"]
    second = command_line("fit", *reward_args, *model, *again[:2], *more, "--data.batch_size", "50")
    assert losses(second, "again")[0] == pytest.approx(expected, rel=1e-4)


def test_an_adapter_of_a_reward_model_opens_in_peft_with_its_head(
    command_line: CommandLine, reward_args: list[str], model_folder: Path
) -> None:
    best = command_line("fit", *reward_args, *LORA).run().checkpoint("best")
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    opened: Any = PeftModel.from_pretrained(base, best)
    names = dict(opened.named_parameters())
    assert any("score.modules_to_save" in name for name in names)


def test_a_margin_in_the_data_moves_the_loss(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path
) -> None:
    plain = losses(command_line("fit", *reward_args))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "pairs.jsonl", [{**row, "margin": 2.0} for row in rows])
    wide = losses(command_line("fit", *reward_args, "--name", "wide"), "wide")
    # at a margin of nearly 0, -log sigmoid(m - 2) is about 2.127 where -log sigmoid(m) is 0.693
    assert wide[0] - plain[0] == pytest.approx(math.log1p(math.exp(2)) - math.log(2), abs=0.3)
    csv_file = tmp_path / "pairs.csv"  # a CSV holds texts
    with open(csv_file, "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt", "chosen", "rejected", "margin"])
        writer.writeheader()
        writer.writerows({**row, "margin": "2.0"} for row in rows)
    from_csv = command_line("fit", *reward_args, "--data.path", csv_file, "--name", "csv")
    assert losses(from_csv, "csv") == wide
    write_rows(tmp_path / "pairs.jsonl", [{**row, "margin": "viel"} for row in rows])
    refused = command_line("fit", *reward_args)
    assert refused.code == 2
    assert "the field 'margin' of 45 pairs is no number" in refused.err
    ignored = ["fine_tune.modules.DPO" if a.endswith(".Reward") else a for a in reward_args]
    assert command_line("fit", *ignored, "--trainer.max_steps", "1").code == 0


def test_settings_and_models_that_cannot_be_scored_are_refused(
    command_line: CommandLine, reward_args: list[str]
) -> None:
    refused = command_line("fit", *reward_args, "--model.center_rewards", "-1")
    assert refused.code == 2 and "model.center_rewards: must not be negative" in refused.err
    config = ["--model.model_name_or_path", "null", "--model.from_config.model_type", "granite"]
    config += ["--model.tokenizer", str(TOKENIZER)]
    refused = command_line("fit", *reward_args, *config)
    assert refused.code == 2
    assert "transformers has no granite with a scalar head" in refused.err


@pytest.mark.parametrize("sft", [[], LORA, QLORA], ids=["full", "lora", "qlora"])
@pytest.mark.parametrize("trained", ["as before", "all weights"])
def test_a_reward_model_goes_on_from_a_supervised_run(
    command_line: CommandLine,
    reward_args: list[str],
    fit_args: list[str],
    sft: list[str],
    trained: str,
) -> None:
    if trained == "all weights" and sft == QLORA:
        return  # quantized weights are frozen
    run = command_line("fit", *fit_args, *sft, "--name", "sft").run("sft")
    more = sft if trained == "as before" else []
    model = ["--model.model_name_or_path", str(run.path), *more]
    outcome = command_line("fit", *reward_args, *model)
    assert losses(outcome)[-1] < 1
    assert "(0.00 %)" not in outcome.out


def test_what_a_reward_model_never_measures_is_no_target(
    command_line: CommandLine, reward_args: list[str]
) -> None:
    targets = ["--test_at_end", "true", "--targets", "{test/exact_match: 0.5}"]
    refused = command_line("fit", *reward_args, *targets)
    assert refused.code == 2
    assert "targets: 'test/exact_match' is not measured" in refused.err


def test_sharing_is_decided_by_hidden_states_whatever_the_head(tmp_path: Path) -> None:
    model: Any = save_small_model(tmp_path / "model", dtype=torch.bfloat16)
    config = model.config
    config.num_labels = 1
    for seed in range(10):
        torch.manual_seed(seed)
        scored = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
        assert can_share(scored, _last_hidden)
