"""Several processes give what one gives: all weights on each (ddp) or a part on each (fsdp2), any number on resume."""

import json
from pathlib import Path

import pytest
import torch
from harness import TOKENIZER, CommandLine, Outcome, fit_on_ranks, write_rows
from preference_runs import write_pairs
from safetensors.torch import load_file

BOUND = 1e-5  # of the weights, relative L2, after 20 steps
SIZE = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2"
NEW = f"{SIZE}, model_type: llama}}"
KINDS = ("SFT", "DPO", "Pretrain")
LORA = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj", "v_proj"]']
STOP = ["--trainer.callbacks+=signal_at.SignalAt", "--trainer.callbacks.name", "SIGTERM"]
STOP += ["--trainer.callbacks.step", "9"]


def flags(kind: str, model: Path, folder: Path, *, lora: bool) -> list[str]:
    """20 steps of 5 rows: every second or fourth process has fewer, in the last step of an epoch some have none."""
    common = ["--data.batch_size", "5", "--trainer.max_steps", "20", "--checkpoint.every", "7"]
    common += ["--data.max_tokens_per_micro_batch", "48", "--model.optimizer.lr", "1e-3"]
    common += ["--trainer.log_every_n_steps", "1", "--generations.rows", "0"]
    common += ["--data.cache_dir", str(folder / "cache"), "--trainer.accelerator", "cpu"]
    common += LORA if lora else []
    if kind == "Pretrain":
        texts = folder / "texts.txt"
        lines = [
            f"Kalimat {i} tentang kota {i * 7 % 50} dan pulau {i * 3 % 11}" for i in range(300)
        ]
        texts.write_text("\n".join(lines))
        made = ["--model.tokenizer", str(TOKENIZER), "--model.from_config", NEW]
        data = ["--data", "TextData", "--data.path", str(texts), "--data.max_length", "48"]
        return ["--model", kind, *made, *data, *common]
    made = ["--model", kind, "--model.model_name_or_path", str(model)]
    if kind == "DPO":
        pairs = write_pairs(folder / "pairs.jsonl")
        return [*made, "--data", "PreferenceData", "--data.path", str(pairs), *common]
    rows = [
        {"q": f"Berapa {i} + {i % 7}?" + " Ya." * (i % 9), "a": str(i + i % 7)} for i in range(40)
    ]
    data = ["--data", "SFTData", "--data.path", str(write_rows(folder / "rows.jsonl", rows))]
    return [*made, *data, "--data.prompt", "{q}", "--data.completion", " {a}", *common]


def assert_same(outcome: Outcome, name: str, other: str) -> None:
    """Weights, the losses of every step, and what was measured at the end."""
    folders = [outcome.run(n) for n in (name, other)]
    mine, theirs = (
        load_file(next((f.checkpoints / str(f.read()["last"])).glob("*model.safetensors")))
        for f in folders
    )
    assert mine.keys() == theirs.keys()
    apart = torch.cat([(mine[key] - theirs[key]).flatten() for key in mine]).norm()
    distance = apart / torch.cat([w.flatten() for w in theirs.values()]).norm()
    print(f"\n{name}: weights {distance:.1e} apart")
    assert distance <= BOUND
    losses = [
        [float(r["train/loss"]) for r in outcome.metrics(n) if r["train/loss"]]
        for n in (name, other)
    ]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=BOUND)
    results = [f.read()["results"][-1]["metrics"] for f in folders]
    assert results[0] == pytest.approx(results[1], rel=1e-4, nan_ok=True)


@pytest.mark.timeout(400)
def test_weights_in_parts_give_the_same_run_and_its_checkpoints_fit_any_number_of_processes(
    command_line: CommandLine, model_folder: Path, tmp_path: Path
) -> None:
    args = flags("SFT", model_folder, tmp_path, lora=False)
    one = command_line("fit", *args, "--name", "one")
    assert one.code == 0, one.err
    two = fit_on_ranks(
        tmp_path, "fsdp2", 2, *args, "--name", "two", *STOP, "--generations.rows", "2"
    )
    assert two.returncode == 143, two.stderr
    went_on = fit_on_ranks(
        tmp_path,
        "fsdp2",
        3,
        *args,
        "--name",
        "two",
        "--ckpt_path",
        "last",
        "--generations.rows",
        "2",
    )
    assert went_on.returncode == 0, went_on.stderr
    assert_same(one, "two", "one")
    config = json.loads((one.run("two").checkpoint("last") / "config.json").read_text())  # type: ignore[operator]
    assert config["architectures"] == ["LlamaForCausalLM"]
    told = [
        float(row["perf/idle_share"]) for row in one.metrics("two") if row.get("perf/idle_share")
    ]
    assert len(told) == 20 and all(0 <= share < 1 for share in told)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_task_on_several_processes(
    kind: str,
    lora: bool,
    strategy: str,
    devices: int,
    command_line: CommandLine,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    args = flags(kind, model_folder, tmp_path, lora=lora)
    one = command_line("fit", *args, "--name", "one")
    assert one.code == 0, one.err
    args[args.index("--data.cache_dir") + 1] = str(
        tmp_path / "other"
    )  # a reference is computed anew
    several = fit_on_ranks(tmp_path, strategy, devices, *args, "--name", "several")
    assert several.returncode == 0, several.stderr
    assert_same(one, "several", "one")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("then", [("ddp", 2), ("fsdp2", 4), ("auto", 1)], ids=str)
@pytest.mark.parametrize("first", [("ddp", 2), ("fsdp2", 2), ("auto", 1)], ids=str)
def test_a_run_goes_on_under_any_strategy_and_number(
    first: tuple[str, int],
    then: tuple[str, int],
    command_line: CommandLine,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    args = flags("SFT", model_folder, tmp_path, lora=False)
    one = command_line("fit", *args, "--name", "one")
    assert one.code == 0, one.err
    begun = fit_on_ranks(tmp_path, *first, *args, "--name", "two", *STOP)
    assert begun.returncode == 143, begun.stderr
    went_on = fit_on_ranks(tmp_path, *then, *args, "--name", "two", "--ckpt_path", "last")
    assert went_on.returncode == 0, went_on.stderr
    assert_same(one, "two", "one")
