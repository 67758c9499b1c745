"""A merged or exported model is the model that was trained, for any Hugging Face tool."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import CommandLine, Outcome, write_rows
from huggingface_hub import constants
from huggingface_hub._local_folder import write_download_metadata
from lora_runs import SIZES, TOKENS, save_model, save_quantized
from peft import AutoPeftModelForCausalLM, LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from small_models import save_small_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fine_tune.model_config import holds_commit
from fine_tune.trained_model import TrainedModel

AUTO, BRIEF = ["--model.lora", "auto"], ["--model.optimizer.lr", "1e-2", "--data.epochs", "1"]


def trained(
    command_line: CommandLine, args: list[str], folder: Path, *more: str, lora: Sequence[str] = AUTO
) -> Path:
    """A run whose adapter differs from nothing; returns its folder."""
    where = ["--model.model_name_or_path", str(folder), *BRIEF]
    outcome = command_line("fit", *args, *where, *lora, *more)
    assert outcome.code == 0, outcome.err
    return outcome.run().path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def merged(command_line: CommandLine, run: Path, *more: str) -> Outcome:
    outcome = command_line("merge", run, "--output", run.parent / "merged", *more)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2"])
def test_a_merged_lora_is_the_adapter_on_its_base(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, architecture: str
) -> None:
    base = save_model(architecture, tmp_path / architecture)
    run = trained(command_line, fit_args, base)
    outcome = merged(command_line, run)
    opened = AutoModelForCausalLM.from_pretrained(run.parent / "merged")
    best = next(run.glob("checkpoints/epoch*"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), best)
    difference = (logits(opened) - logits(adapted)).abs().max()
    assert difference < 1e-4
    assert (logits(opened) - logits(adapted.unload())).abs().max() > 100 * difference
    assert "largest difference of a logit, read back:" in outcome.out
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    stops = GenerationConfig.from_pretrained(run.parent / "merged").eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    card = (run.parent / "merged" / "README.md").read_text()
    assert "A LoRA adapter merged into its base." in card and "| model.lora.r | 8 |" in card


@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2"])
def test_a_merged_qlora_is_the_adapter_on_the_4_bit_base(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, architecture: str
) -> None:
    base = save_model(architecture, tmp_path / architecture)
    run = trained(command_line, fit_args, base, "--model.quantization", "nf4")
    merged(command_line, run)
    opened = AutoModelForCausalLM.from_pretrained(run.parent / "merged")
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bits, dtype=torch.float32
    )
    for module in quantized.modules():  # in float32, not as this CPU would at an evaluation
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    best = next(run.glob("checkpoints/epoch*"))
    adapted = PeftModel.from_pretrained(quantized, best)
    wrong = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), best)
    difference = (logits(opened) - logits(adapted)).abs().max()
    assert difference < 5e-3
    assert (logits(opened) - logits(wrong)).abs().max() > 2 * difference


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_no_more_than_one_block_is_in_float32_at_a_time(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    base = tmp_path / "base"
    save_small_model(base, **{**SIZES, "num_hidden_layers": 4}, dtype=torch.bfloat16)
    more = ["--trainer.precision", "bf16-mixed"]
    more += ["--model.quantization", quantization] if quantization else []
    run = trained(command_line, fit_args, base, *more)
    loaded: list[Any] = []
    load = TrainedModel.load
    monkeypatch.setattr(TrainedModel, "load", lambda self: loaded.append(load(self)) or loaded[0])
    computed = LlamaDecoderLayer.forward
    wide: list[list[int]] = []  # at each call, the blocks with base weights in float32

    def weights(block: Any) -> set[torch.dtype]:
        kept = (p for n, p in block.named_parameters() if "lora_" not in n and "layernorm" not in n)
        return {p.dtype for p in kept}

    def observed(self: Any, *args: Any, **options: Any) -> Any:
        blocks = [m for m in loaded[0].modules() if isinstance(m, LlamaDecoderLayer)]
        if self in blocks:
            wide.append([i for i, b in enumerate(blocks) if torch.float32 in weights(b)])
        return computed(self, *args, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", observed)
    outcome = merged(command_line, run)
    assert {len(blocks) for blocks in wide} <= {0, 1}
    assert [i for blocks in wide for i in blocks][:4] == [0, 1, 2, 3]
    (difference,) = re.findall("of a logit, merged: (.*)", outcome.out)
    assert float(difference) < 2e-6


@pytest.mark.parametrize("lora", ["use_dora", "use_rslora", "lora_bias"])
def test_kinds_of_lora_are_merged_from_a_4_bit_base(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, lora: str
) -> None:
    kind = [f"--model.lora.{lora}", "true", "--model.lora.target_modules", '["c_attn", "c_fc"]']
    base, nf4 = save_model("gpt2", tmp_path / "gpt2"), ["--model.quantization", "nf4"]
    merged(command_line, trained(command_line, fit_args, base, *nf4, lora=kind))


def test_a_mixture_of_experts_is_merged(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    save_small_model(tmp_path / "moe", "mixtral", **SIZES, **experts)
    names = '["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]'
    lora = ["--model.lora.target_modules", '["q_proj"]', "--model.lora.target_parameters", names]
    merged(command_line, trained(command_line, fit_args, tmp_path / "moe", lora=lora))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_a_checkpoint_that_is_quantized_already_is_merged(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, kind: str
) -> None:
    base = save_quantized(kind, tmp_path / kind)
    run = trained(command_line, fit_args, base)
    merged(command_line, run, "--dtype", "float32")
    opened = AutoModelForCausalLM.from_pretrained(run.parent / "merged")
    assert getattr(opened.config, "quantization_config", None) is None


def test_a_merge_in_16_bit_is_as_near_as_16_bit_can_be(
    command_line: CommandLine, fit_args: list[str], model_folder: Path
) -> None:
    run = trained(command_line, fit_args, model_folder)
    outcome = merged(command_line, run, "--dtype", "bfloat16")
    assert "the adapter's model in this type" in outcome.out
    weights = load_file(run.parent / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_a_merged_reward_model_scores_as_the_adapter_did(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "llama")
    run = trained(command_line, reward_args, base)
    merged(command_line, run)
    opened = AutoModelForSequenceClassification.from_pretrained(run.parent / "merged")
    assert opened.config.num_labels == 1
    head = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = PeftModel.from_pretrained(head, next(run.glob("checkpoints/epoch*")))
    difference = (logits(opened) - logits(adapted)).abs().max()
    assert difference < 1e-4
    assert (logits(opened) - logits(adapted.unload())).abs().max() > 100 * difference


def test_a_merged_model_is_written_in_shards(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained(command_line, fit_args, save_model("gpt2", tmp_path / "gpt2"))
    monkeypatch.setattr("fine_tune.commands.merge.SHARD_BYTES", "200KB")
    merged(command_line, run)
    assert len(list((run.parent / "merged").glob("model-*-of-*.safetensors"))) > 2
    AutoModelForCausalLM.from_pretrained(run.parent / "merged")


def test_a_full_disk_is_told_and_leaves_nothing(
    command_line: CommandLine,
    fit_args: list[str],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained(command_line, fit_args, model_folder)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    outcome = command_line("merge", run)
    assert outcome.code == 2 and "No space left on device" in outcome.err and "free" in outcome.err
    assert not [p for p in run.iterdir() if "merged" in p.name]


@pytest.mark.parametrize(
    ("more", "bound"), [([], 1e-4), (["--model.quantization", "nf4"], 5e-3)], ids=["lora", "qlora"]
)
def test_a_merge_that_differs_is_refused_and_leaves_nothing(
    command_line: CommandLine,
    fit_args: list[str],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    bound: float,
) -> None:
    run = trained(command_line, fit_args, model_folder, *more)
    whole = LoraModel.merge_and_unload

    def spoiled(self: Any, **options: Any) -> Any:
        model = whole(self, **options)
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + 4 * bound)  # of logits of about half
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoiled)
    outcome = command_line("merge", run)
    assert outcome.code == 2
    told = re.search(
        "logits differ from the adapter's by up to (.*), allowed are (.*);", outcome.err
    )
    assert told is not None and told[2] == f"{bound:.2g}"
    assert bound < float(told[1]) < 10 * bound
    assert not [p for p in run.iterdir() if "merged" in p.name]


def test_another_base_is_refused_by_its_weights_and_a_moved_one_found(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "llama")
    run = trained(command_line, fit_args, base)
    moved = tmp_path / "moved"
    base.rename(moved)
    gone = command_line("merge", run)
    assert gone.code == 2 and "does not exist" in gone.err and "--base_model" in gone.err
    merged(command_line, run, "--base_model", str(moved))
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    other = command_line("merge", run, "--base_model", moved, "--output", tmp_path / "other")
    assert other.code == 2 and "was trained on other weights" in other.err
    assert not (tmp_path / "other").exists()


def test_a_base_of_the_hub_is_found_in_folders_that_hold_the_same_commit(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hub's cache as a download leaves it; nothing is downloaded here."""
    commit, other = "a" * 40, "b" * 40
    cached = tmp_path / "cache" / "models--owner--name"
    snapshot = save_model("llama", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run = trained(command_line, fit_args, Path("owner/name"))
    identity = json.loads(next(run.glob("checkpoints/*/run_identity.json")).read_text())
    assert identity["model.weights"] == f"owner/name@{commit}"

    folder = Path(shutil.copytree(snapshot, tmp_path / "downloaded"))
    refused = command_line("merge", run, "--base_model", folder, "--output", tmp_path / "a")
    assert refused.code == 2 and "was trained on other weights" in refused.err
    assert not (folder / ".cache").exists(), "a base is only read"
    for commit_there, code in [(other, 2), (commit, 0)]:
        for file in snapshot.iterdir():  # as hf download --local-dir does
            write_download_metadata(folder, file.name, commit_there, "etag")
        merge = command_line("merge", run, "--base_model", folder, "--output", tmp_path / "a")
        assert merge.code == code, merge.err
    before = sorted((p, p.stat().st_mtime) for p in folder.rglob("*"))
    assert holds_commit(folder, commit)
    assert sorted((p, p.stat().st_mtime) for p in folder.rglob("*")) == before
    assert (
        command_line("merge", run, "--base_model", snapshot, "--output", tmp_path / "b").code == 0
    )
    trained(command_line, fit_args, folder, "--name", "of_folder")
    of_folder = run.parent.parent / "of_folder" / "version_0"
    assert command_line("merge", of_folder, "--base_model", "owner/name").code == 0

    os.utime(folder / "model.safetensors", (4e9, 4e9))  # changed after the download
    assert not holds_commit(folder, commit)
    newer = snapshot.rename(snapshot.with_name(other))
    refused = command_line("merge", run, "--base_model", newer, "--output", tmp_path / "c")
    assert refused.code == 2 and "was trained on other weights" in refused.err


def test_nothing_is_overwritten(
    command_line: CommandLine, fit_args: list[str], model_folder: Path
) -> None:
    run = trained(command_line, fit_args, model_folder)
    (run / "merged").mkdir()
    (run / "merged" / "mine.txt").write_text("kept")
    refused = command_line("merge", run)
    assert refused.code == 2 and "exists and is not overwritten" in refused.err
    assert [p.name for p in (run / "merged").iterdir()] == ["mine.txt"]
    for there in (".", "..", "/"):
        refused = command_line("export", run, "--output", there)
        assert refused.code == 2 and "exists and is not overwritten" in refused.err


def test_an_exported_adapter_opens_in_peft(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "llama")
    run = trained(command_line, fit_args, base)
    outcome = command_line("export", run)
    assert outcome.code == 0, outcome.err
    opened = AutoPeftModelForCausalLM.from_pretrained(run / "exported")
    best = next(run.glob("checkpoints/epoch*"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), best)
    assert torch.equal(logits(opened), logits(adapted))
    names = {p.name for p in (run / "exported").iterdir()}
    assert "README.md" in names and not names & {"training_state.pt", "manifest.json"}
    named = command_line("export", run, "--output", tmp_path / "a\x1b[31m")
    assert named.code == 0 and "a\\x1b[31m" in named.out and "\x1b" not in named.out


@pytest.mark.parametrize(("rank", "flag"), [("16", ""), ("17", "--max-lora-rank 32 ")])
def test_vllm_is_given_the_checkpoint_of_a_base_run_and_room_for_the_rank(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    flag: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = command_line("fit", *fit_args, "--trainer.max_steps", "1", "--name", "base").run("base")
    named, lora = base.path.relative_to(tmp_path), ["--model.lora.r", rank]
    run = trained(command_line, fit_args, named, "--trainer.max_steps", "1", lora=lora)
    exported = command_line("export", run)
    assert exported.code == 0, exported.err
    serve = re.search(r"vllm serve (\S+) --enable-lora (.*)--lora-modules", exported.out)
    assert serve is not None and serve[2] == flag
    assert Path(serve[1]) == base.checkpoint("best") and (Path(serve[1]) / "config.json").is_file()
    dora = ["--name", "dora", "--trainer.max_steps", "1"]
    trained(command_line, fit_args, named, *dora, lora=[*lora, "--model.lora.use_dora", "true"])
    exported = command_line("export", "dora", "--output", tmp_path / "exported")
    assert exported.code == 0 and "vllm serve" not in exported.out  # which serves no such adapter


def test_a_folder_that_reads_like_a_name_of_the_hub_is_none_wherever_it_is_exported_from(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model("llama", tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    run = trained(command_line, fit_args, Path("models/llama"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exported = command_line("export", run)
    assert exported.code == 0, exported.err
    assert "base_model:" not in (run / "exported" / "README.md").read_text()


def test_full_weights_are_exported_and_have_nothing_to_merge(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--data.epochs", "1")
    run = outcome.run().path
    refused = command_line("merge", run)
    assert refused.code == 2 and "trained all weights" in refused.err
    exported = command_line("export", run)
    assert exported.code == 0, exported.err
    ours = AutoModelForCausalLM.from_pretrained(run / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(next(run.glob("checkpoints/epoch*")))
    assert torch.equal(logits(ours), logits(theirs))


def test_the_card_tells_the_runs_own_results_with_rows_intervals_licences_and_purpose(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    train = fit_args[fit_args.index("--data.path") + 1]
    more = ["--trainer.max_steps", "1", "--test_at_end", "true", "--purpose", "sums | of two"]
    more += ["--generations.test_rows", "all"]
    more += ["--licences", json.dumps({train: "CC-BY-4.0", "all": "MIT"})]
    run = command_line("fit", *fit_args, *more).run()
    rows = [{"question": f"Ibu kota ke-{i}?", "answer": "Jakarta"} for i in range(7)]
    paths = {"train": train, "test": str(write_rows(tmp_path / "other.jsonl", rows))}
    command = ["test", "--config", run.path / "config.yaml", "--ckpt_path", "best"]
    tested = command_line(*command, "--data.path", json.dumps(paths), root=False)
    assert tested.code == 0, tested.err
    own, others = run.read()["results"][-2:]
    assert others["num_rows"] == 7 and others["metrics"]["test/loss"] != own["metrics"]["test/loss"]
    assert command_line("export", run.path).code == 0
    card = (run.path / "exported" / "README.md").read_text()
    (loss,) = [line for line in card.splitlines() if "| test/loss |" in line]
    low, high = own["intervals"]["test/loss"]
    value = own["metrics"]["test/loss"]
    assert loss.endswith(f"| {own['num_rows']} | {value:.6g} | {low:.6g} – {high:.6g} |")
    (exact,) = [line for line in card.splitlines() if "| test/exact_match |" in line]
    assert re.search(rf"\| {own['num_rows']} \| [\d.]+ \| [\d.]+ – [\d.]+ \|$", exact)
    (measured,) = [line for line in card.splitlines() if "| val/loss |" in line]
    assert f"| {run.read()['num_rows']['validation']} |" in measured
    assert "Purpose: sums \\| of two" in card
    assert f"* Licence of {train}: CC-BY-4.0" in card and "* Licence of all other data: MIT" in card


@pytest.mark.parametrize(
    "damage",
    [
        {"results": [{}]},
        {"identity": {"data.files": [1]}},
        {"parents": 3},
        {"checkpoints": 3},
        {"checkpoints": [3]},
    ],
)
def test_a_damaged_record_is_told_and_nothing_is_written(
    command_line: CommandLine, fit_args: list[str], damage: dict[str, Any]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    run.update(damage)
    refused = command_line("export", run.path)
    assert refused.code == 2 and "run.json: the run's record is damaged" in refused.err
    assert not [p for p in run.path.iterdir() if "exported" in p.name]


def test_a_damaged_best_checkpoint_is_passed_over_and_told(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--checkpoint.every", "2", "--checkpoint.keep", "5")
    run = outcome.run()
    best = run.checkpoint("best")
    assert best is not None
    weights = best / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    exported = command_line("export", run.path)
    assert exported.code == 0, exported.err
    assert "is damaged" in exported.out and best.name in exported.out
    others = [p for p in run.checkpoints.glob("epoch*/model.safetensors") if p != weights]
    written = (run.path / "exported" / "model.safetensors").read_bytes()
    assert written in [p.read_bytes() for p in others]


def test_a_merged_reward_is_read_where_it_was_trained(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "llama")
    config = json.loads((base / "config.json").read_text())
    config["pad_token_id"] = config["eos_token_id"]  # transformers would read one token early
    (base / "config.json").write_text(json.dumps(config))
    run = trained(command_line, reward_args, base)
    merged(command_line, run)
    opened = AutoModelForSequenceClassification.from_pretrained(run.parent / "merged").eval()
    assert opened.config.pad_token_id not in (None, config["eos_token_id"])
    row = torch.tensor([[5, 6, 7, config["eos_token_id"]]])
    with torch.no_grad():
        hidden = opened.base_model(input_ids=row).last_hidden_state[:, -1]
        assert torch.allclose(opened(input_ids=row).logits, opened.score(hidden))


def test_an_adapter_on_a_merged_adapter_is_merged_and_not_exported_alone(
    command_line: CommandLine, fit_args: list[str], dpo_args: list[str], tmp_path: Path
) -> None:
    sft = trained(command_line, fit_args, save_model("llama", tmp_path / "llama"))
    trained(command_line, dpo_args, sft, "--name", "dpo")
    dpo = sft.parent.parent / "dpo" / "version_0"
    refused = command_line("export", dpo)
    assert refused.code == 2 and "another adapter merged into it" in refused.err
    merged(command_line, dpo)
    (tmp_path / "llama").rename(tmp_path / "moved")
    gone = command_line("merge", dpo)
    assert gone.code == 2 and "adapter_config.json names as its base" in gone.err
    assert "--base_model" not in gone.err  # which is another one


def test_a_tied_trained_embedding_beside_a_quantized_base_is_merged(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    save_small_model(tmp_path / "tied", "llama", **SIZES, tie_word_embeddings=True)
    lora = ["--model.lora.target_modules", '["q_proj"]', "--model.quantization", "nf4"]
    lora += ["--model.lora.modules_to_save", '["embed_tokens"]']
    merged(command_line, trained(command_line, fit_args, tmp_path / "tied", lora=lora))


def test_a_base_with_sampling_settings_is_merged(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "llama")
    (base / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "do_sample": False})
    )
    merged(command_line, trained(command_line, fit_args, base))


def test_what_a_run_folder_names_is_never_executed(
    command_line: CommandLine, fit_args: list[str], model_folder: Path, tmp_path: Path
) -> None:
    run = trained(command_line, fit_args, model_folder)
    config = yaml.safe_load((run / "config.yaml").read_text())
    planted = tmp_path / "executed"
    command = {"class_path": "os.system", "init_args": {"command": f"touch {planted}"}}
    config["model"]["init_args"]["optimizer"] = command
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert command_line("merge", run).code == 0
    refused = command_line("fit", "--config", run / "config.yaml", root=False)
    assert refused.code == 2 and "'os.system' is not an optimizer" in refused.err
    assert not planted.exists()


def test_a_converter_is_tried_where_it_is_installed(
    command_line: CommandLine,
    fit_args: list[str],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converter = tmp_path / "bin" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.write_text("import sys; open(sys.argv[3], 'w').write('x' * 9)")
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent), prepend=":")
    run = trained(command_line, fit_args, model_folder)
    assert "model.gguf has 9 bytes" in merged(command_line, run).out
