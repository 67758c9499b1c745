"""DPO's reference: cached or live, of new adapters, all weights, or an adapter that goes on on a quantized base."""

import json
import math
from pathlib import Path

import pytest
import torch
from harness import REPOSITORY, CommandLine
from lora_runs import STOP
from peft import PeftModel
from preference_runs import LORA, losses, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LIVE = ["--model.reference", "live"]
QUANTIZED = ["--model.quantization", "nf4", "--model.lora", "auto"]
PISSA = [*LORA, "--model.lora.init_lora_weights", "pissa"]


@pytest.mark.parametrize("trained", [[], LORA, PISSA], ids=["full", "lora", "pissa"])
def test_a_live_reference_gives_the_losses_of_a_cached_one(
    command_line: CommandLine, dpo_args: list[str], trained: list[str]
) -> None:
    args = [*dpo_args, *trained]
    cached = losses(command_line("fit", *args, "--name", "cached"), "cached")
    live = command_line("fit", *args, *LIVE, "--name", "live")
    assert "pairs of train to compute" not in live.out
    assert losses(live, "live") == pytest.approx(cached, rel=1e-5)
    assert cached[0] == pytest.approx(math.log(2), abs=2e-6)
    sharing = [*args, *LIVE, "--model.prefix_sharing", "false", "--name", "unshared"]
    assert losses(command_line("fit", *sharing), "unshared") == pytest.approx(cached, rel=1e-5)


@pytest.mark.parametrize("trained", [[], LORA], ids=["full", "lora"])
def test_a_live_reference_is_found_again_after_a_restart(
    command_line: CommandLine, dpo_args: list[str], trained: list[str]
) -> None:
    args = [*dpo_args, *trained, *LIVE, "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *STOP, "5")
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert losses(resumed) == losses(straight, "straight")
    ours, theirs = weights(resumed, "run"), weights(straight, "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_dpo_goes_on_with_the_adapter_of_a_qlora_run(
    command_line: CommandLine,
    dpo_args: list[str],
    fit_args: list[str],
    model_folder: Path,
    tmp_path: Path,
    reference: str,
) -> None:
    sft_args = [*fit_args, *QUANTIZED, "--model.optimizer.lr", "1e-2"]
    sft = command_line("fit", *sft_args, "--name", "sft").run("sft")
    best = sft.checkpoint("best")
    assert best is not None
    args = [*dpo_args, *QUANTIZED, "--model.model_name_or_path", str(sft.path)]
    args += ["--model.reference", reference, "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    assert losses(straight, "straight")[0] == pytest.approx(math.log(2), abs=2e-6)
    before = load_file(best / "adapter_model.safetensors")
    after = weights(straight, "straight")
    assert before.keys() == after.keys()
    moved = [torch.norm(after[n] - before[n]) / torch.norm(before[n]) for n in before]
    assert 0 < float(max(moved)) < 1  # it began at the adapter of the supervised run
    named = straight.run("straight").checkpoint("last")
    assert named is not None
    saved = json.loads((named / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model_folder)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), named)

    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *STOP, "5")
    for file in (tmp_path / "lightning_logs" / ".cache" / "reference").glob("*"):
        file.unlink()
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert losses(resumed) == losses(straight, "straight")
    assert all(torch.equal(after[n], value) for n, value in weights(resumed, "run").items())


def test_an_adapter_that_cannot_go_on_says_what_it_is(
    command_line: CommandLine, dpo_args: list[str], fit_args: list[str]
) -> None:
    sft = command_line("fit", *fit_args, *QUANTIZED, "--name", "sft").run("sft")
    model = ["--model.model_name_or_path", str(sft.path), "--model.quantization", "nf4"]
    other = command_line("fit", *dpo_args, *model, *LORA)
    assert other.code == 2
    assert "holds an adapter, which goes on being trained on its quantized base" in other.err
    assert "it has r 8, and the config gives 4: set model.lora: auto" in other.err


@pytest.mark.parametrize(
    ("sft", "told"),
    [
        (["--model.lora.use_dora", "true"], "it has use_dora True, and the config gives False"),
        (["--model.lora.modules_to_save", "[lm_head]"], "has other weights than the config's"),
    ],
)
def test_no_part_of_an_adapter_that_goes_on_is_dropped(
    command_line: CommandLine, dpo_args: list[str], fit_args: list[str], sft: list[str], told: str
) -> None:
    quantized = ["--model.quantization", "nf4", *LORA]
    run = command_line("fit", *fit_args, *quantized, *sft, "--name", "sft").run("sft")
    model = ["--model.model_name_or_path", str(run.path)]
    refused = command_line("fit", *dpo_args, *quantized, *model)
    assert refused.code == 2
    assert told in refused.err


def test_an_adapter_that_changed_its_base_does_not_go_on_on_a_quantized_one(
    command_line: CommandLine, dpo_args: list[str], fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, *PISSA, "--name", "sft").run("sft")
    model = ["--model.model_name_or_path", str(run.path)]
    refused = command_line("fit", *dpo_args, *QUANTIZED, *model)
    assert refused.code == 2
    assert "it has init_lora_weights 'pissa', which changed its base" in refused.err


def test_all_weights_are_trained_after_an_adapter_was_merged(
    command_line: CommandLine, dpo_args: list[str], fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, *LORA, "--name", "sft").run("sft")
    outcome = command_line("fit", *dpo_args, "--model.model_name_or_path", str(run.path))
    assert losses(outcome)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert "(100.00 %)" in outcome.out


def test_another_start_is_another_reference(command_line: CommandLine, dpo_args: list[str]) -> None:
    random = ["--model.lora.r", "4", "--model.lora.init_lora_weights", "false"]
    for i, more in enumerate(
        (
            ["--model.lora.target_modules", "[q_proj]"],
            ["--model.lora.target_modules", "[q_proj, v_proj, up_proj]"],
            ["--model.lora.target_modules", "[q_proj]", "--model.lora.lora_alpha", "64"],
        )
    ):
        outcome = command_line("fit", *dpo_args, *random, *more, "--name", f"r{i}")
        assert losses(outcome, f"r{i}")[0] == pytest.approx(math.log(2), abs=2e-6)


def test_weights_in_another_type_are_another_reference(
    command_line: CommandLine, dpo_args: list[str]
) -> None:
    args = [*dpo_args, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1"]
    assert "pairs of train to compute" in command_line("fit", *args, "--name", "full").out
    assert "pairs of train to compute" in command_line("fit", *args, *LORA, "--name", "lora").out


def test_a_run_folder_that_is_not_there_is_told_how_to_make_it(
    command_line: CommandLine, dpo_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    folder = "lightning_logs/quickstart/version_7"
    refused = command_line("fit", *dpo_args, "--model.model_name_or_path", folder)
    assert refused.code == 2
    made = "make it first: python -m fine_tune fit --config configs/quickstart.yaml"
    assert f"'{folder}' does not exist" in refused.err and made in refused.err
