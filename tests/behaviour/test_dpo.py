"""DPO on small real models: what it promises whatever the device, the micro-batches and the restarts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine
from lora_runs import STOP
from peft import PeftModel
from preference_runs import LORA, losses, weights
from processes import TWO, start
from small_models import save_small_model
from transformers import AutoModelForCausalLM

from fine_tune.batches import PreferenceBatch
from fine_tune.losses import IGNORE_INDEX
from fine_tune.model_config import load_config
from fine_tune.models import load_model
from fine_tune.modules.pair_logps import pair_logps
from fine_tune.modules.pairs import can_share

NO_CACHE = ["--data.cache_dir"]  # of its own: both processes compute the reference


@pytest.mark.parametrize("trained", [[], LORA], ids=["full", "lora"])
def test_the_first_loss_is_ln_2_and_the_rewards_come_apart(
    command_line: CommandLine, dpo_args: list[str], trained: list[str]
) -> None:
    outcome = command_line("fit", *dpo_args, *trained, "--data.epochs", "4")
    assert losses(outcome)[0] == pytest.approx(math.log(2), abs=1e-6)
    rows = outcome.metrics()
    assert float(rows[-1]["val/rewards_accuracy"]) > 0.6
    assert float(rows[-1]["val/rewards_margin"]) > 0
    result = outcome.run().read()["results"][-1]["metrics"]
    low, high = (result[f"val/rewards_accuracy_{end}"] for end in ("low", "high"))
    assert low <= result["val/rewards_accuracy"] <= high


@pytest.mark.parametrize("trained", [[], LORA], ids=["full", "lora"])
def test_prefix_sharing_and_micro_batches_change_nothing(
    command_line: CommandLine, dpo_args: list[str], trained: list[str]
) -> None:
    args = [*dpo_args, *trained]
    curves = [
        losses(command_line("fit", *args, "--name", f"r{i}", *more), f"r{i}")
        for i, more in enumerate(
            (
                ["--model.prefix_sharing", "true"],
                ["--model.prefix_sharing", "false"],
                ["--data.max_tokens_per_micro_batch", "40"],
            )
        )
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_two_processes_give_the_losses_of_one(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path
) -> None:
    single = command_line("fit", *dpo_args, "--name", "single")
    process = start([*dpo_args, *TWO, "--name", "together", *NO_CACHE, str(tmp_path)], tmp_path)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert losses(single, "together") == pytest.approx(losses(single, "single"), rel=1e-5)


@pytest.mark.parametrize("trained", [[], LORA], ids=["full", "lora"])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(
    command_line: CommandLine, dpo_args: list[str], trained: list[str], tmp_path: Path
) -> None:
    args = [*dpo_args, *trained, "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *STOP, "5")
    for file in (tmp_path / "lightning_logs" / ".cache" / "reference").glob("*"):
        file.unlink()  # the reference is found again from the weights the run started from
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert losses(resumed) == losses(straight, "straight")
    ours, theirs = weights(resumed, "run"), weights(straight, "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_reference_is_computed_once_for_all_betas_and_seeds(
    command_line: CommandLine, dpo_args: list[str]
) -> None:
    first = command_line("fit", *dpo_args)
    assert "pairs of train to compute" in first.out
    other = ["--model.beta", "0.3", "--seed_everything", "7", "--model.ld_alpha", "0.5"]
    second = command_line("fit", *dpo_args, *other, "--data.seed", "7")
    assert losses(second, version=1)[0] == pytest.approx(math.log(2), abs=2e-6)
    assert "to compute" not in second.out


@pytest.mark.parametrize(
    "loss", ["ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo"]
)
def test_every_loss_lowers_itself(
    command_line: CommandLine, dpo_args: list[str], loss: str
) -> None:
    more = ["--model.loss", loss, "--data.epochs", "4", "--model.sft_weight", "0.1"]
    outcome = command_line("fit", *dpo_args, *more)
    curve = losses(outcome)
    assert sum(curve[-5:]) < sum(curve[:5])
    assert ("reference:" in outcome.out) == (loss not in ("simpo", "orpo"))


def test_early_stopping_and_best_follow_the_accuracy(
    command_line: CommandLine, dpo_args: list[str]
) -> None:
    monitor = ["--checkpoint.monitor", "val/rewards_accuracy", "--checkpoint.mode", "max"]
    record = command_line("fit", *dpo_args, *monitor, "--test_at_end", "true").run().read()
    assert record["monitor"] == "val/rewards_accuracy"
    assert [result["split"] for result in record["results"]] == ["validation", "test"]
    assert "test/rewards_accuracy_low" in record["results"][1]["metrics"]
    refused = command_line("fit", *dpo_args, "--checkpoint.monitor", "val/perplexity")
    assert refused.code == 2
    assert "checkpoint.monitor: 'val/perplexity' is not measured; known: val/loss" in refused.err


@pytest.mark.parametrize("trained", [[], LORA], ids=["full", "lora"])
def test_dpo_continues_from_the_best_checkpoint_of_a_run(
    command_line: CommandLine,
    dpo_args: list[str],
    fit_args: list[str],
    trained: list[str],
    model_folder: Path,
) -> None:
    sft = command_line("fit", *fit_args, *trained, "--name", "sft").run("sft")
    model = ["--model.model_name_or_path", str(sft.path), "--trainer.max_steps", "2"]
    outcome = command_line("fit", *dpo_args, *model, *LORA)
    assert losses(outcome)[0] == pytest.approx(math.log(2), abs=1e-6)
    best = sft.checkpoint("best")
    whole: Any = AutoModelForCausalLM.from_pretrained(best if not trained else model_folder)
    if trained:
        whole = PeftModel.from_pretrained(whole, best).merge_and_unload()
    loaded = load_model(load_config(str(sft.path), None, None), str(sft.path))
    assert all(
        torch.allclose(ours, theirs, atol=1e-7)
        for ours, theirs in zip(loaded.parameters(), whole.parameters(), strict=True)
    )
    adapter = outcome.run().checkpoint("last")
    named = json.loads((adapter / "adapter_config.json").read_text())  # type: ignore[operator]
    assert named["base_model_name_or_path"] == str(best)


def test_a_run_without_a_checkpoint_is_told_how_to_make_one(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text("{}")
    refused = command_line("fit", *dpo_args, "--model.model_name_or_path", tmp_path / "empty")
    assert refused.code == 2
    assert f"python -m fine_tune fit --config {tmp_path / 'empty' / 'config.yaml'}" in refused.err


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "qwen2"])
def test_a_shared_prompt_gives_the_same_log_probabilities(
    architecture: str, attention: str, tmp_path: Path
) -> None:
    heads = {"num_key_value_heads": 2} if architecture != "gpt2" else {}
    model: Any = save_small_model(tmp_path / "model", architecture, **heads).eval()
    model.set_attn_implementation(attention)
    assert can_share(model, _logps)
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4], labels[1, :2], labels[1, 9:] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    batch = PreferenceBatch(
        input_ids_BT=ids,
        labels_BT=labels,
        lengths=[12, 9],
        num_prompt=[4, 2],
        num_chosen=[3, 4],
        num_supervised=[8, 7],
        margins=[0.0, 0.0],
        row_ids=[0, 1],
    )
    with torch.no_grad():
        one, two = (pair_logps(model, batch, shared=shared) for shared in (True, False))
    for shared, unshared in zip(one, two, strict=True):
        torch.testing.assert_close(shared, unshared, rtol=1e-6, atol=1e-6)
    assert one.num_tokens_B2.tolist() == [[3, 5], [4, 3]]


def test_settings_that_cannot_be_meant_are_refused(
    command_line: CommandLine, dpo_args: list[str]
) -> None:
    wrong = ["--model.beta", "0", "--model.label_smoothing", "0.5", "--model.ld_alpha", "2"]
    refused = command_line("fit", *dpo_args, *wrong)
    assert refused.code == 2
    for told in ("model.beta: must be above 0", "model.label_smoothing: lies", "model.ld_alpha"):
        assert told in refused.err


def test_rows_without_pairs_are_named(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    refused = command_line("fit", *dpo_args)
    assert refused.code == 2
    assert "pairs have the fields 'chosen' and 'rejected' (and 'prompt')" in refused.err


def test_analyze_tells_how_far_length_alone_goes(
    command_line: CommandLine, dpo_args: list[str]
) -> None:
    outcome = command_line("analyze", *dpo_args, "--show", "1")
    assert outcome.code == 0, outcome.err
    assert "at most " in outcome.out and " pairs of one" in outcome.out
    assert "'always the longer' is right for 0.0% of the pairs that differ in length" in outcome.out
    assert (
        "WARNING: 'always the shorter answer' is right for 100% of the training pairs"
        in outcome.out
    )
    assert outcome.out.count("[stop ") == 2  # of both answers


def test_pairs_that_teach_nothing_are_refused_or_left_out_and_counted(
    command_line: CommandLine, dpo_args: list[str], tmp_path: Path
) -> None:
    with open(tmp_path / "pairs.jsonl", "a") as handle:
        handle.write(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    refused = command_line("fit", *dpo_args)
    assert refused.code == 2
    assert "pairs.jsonl:51: chosen and rejected are the same" in refused.err
    dropped = command_line("fit", *dpo_args, "--data.empty_completions", "drop")
    assert dropped.code == 0, dropped.err
    assert "1 rows with twice the same answer left out" in dropped.out


def _logps(model: Any, batch: PreferenceBatch, shared: bool) -> torch.Tensor:
    return pair_logps(model, batch, shared=shared).head_B2
