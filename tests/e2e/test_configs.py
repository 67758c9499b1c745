"""Every shipped YAML parses and takes real steps, with tiny stand-ins for model and data."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from harness import REPOSITORY, TOKENIZER, CommandLine, write_rows
from report_items import check_every_item
from small_models import save_small_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PhiConfig,
    Qwen2Config,
)

from fine_tune.runs.run_folder import RunFolder
from fine_tune.summary import reached

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SIZES = {"10m": (4_096, 9_988_800), "50m": (32_000, 50_473_472), "150m": (32_000, 152_006_400)}
SIZES |= {"3b": (32_000, 2_997_127_680)}


def stand_in_model(name: str, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    if "qwen" in name or name == "hh_dpo":
        config = Qwen2Config(**sizes, **ids, num_key_value_heads=2)
    elif "gpt2" in name:
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, **ids)
    else:
        config = PhiConfig(**sizes, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stand_in_rows(name: str, folder: Path, num_train: int = 40) -> str:
    """Write tiny rows in place of the experiment's own, with the fields its YAML names."""
    if name == "qwen_coder_chat":
        turns = [{"role": "user", "content": "hai"}, {"role": "assistant", "content": "halo"}]
        rows = [
            {"messages": [{**turns[0], "content": f"hai {i}"}, turns[1]]} for i in range(num_train)
        ]
        return str(write_rows(folder / "chat.jsonl", rows))
    if name == "phi2_dpo":
        rows = [
            {"question": f"{i}?", "chosen": f"{i}.", "rejected": f"{i + 1}."}
            for i in range(num_train)
        ]
        return str(write_rows(folder / "pairs.jsonl", rows))
    if name == "hh_dpo":
        talk = "\n\nHuman: {i}?\n\nAssistant:"
        rows = [
            {"chosen": f"{talk} {i}.".format(i=i), "rejected": f"{talk} ya.".format(i=i)}
            for i in range(num_train)
        ]
        return str(write_rows(folder / "talks.jsonl", rows))
    files = {}
    for split, count in {"train": num_train, "validation": 4, "test": 4}.items():
        rows = [{"document": f"satu {i % 7}", "summary": f"dua {i % 7}"} for i in range(count)]
        files[split] = str(write_rows(folder / f"{split}.jsonl", rows))
    return str(files)


def stand_in_sources(name: str, folder: Path, num_rows: int) -> str:
    """Write tiny rows in place of the hub's, with their columns; files and templates stay the YAML's own."""
    columns = {
        "genta-tech/squad_pairs_indo": ("0", "1"),
        "cahya/alpaca-id-cleaned": ("instruction", "input", "output"),
    }
    config = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    sources = config["data"]["init_args"]["sources"]
    for source in sources:
        if not (REPOSITORY / source["path"]).exists():
            rows = [
                {column: f"{column} {i}" for column in columns[source["path"]]}
                for i in range(num_rows)
            ]
            file = folder / f"{source['path'].replace('/', '_')}.jsonl"
            source["path"] = str(write_rows(file, rows))
    return json.dumps(sources)


def stand_in_texts(name: str, folder: Path, num_texts: int) -> list[str]:
    """Write texts in place of the user's, and make the model small; its kind stays the YAML's own."""
    file = folder / "texts.txt"
    file.write_text("\n".join(f"satu {i % 7} dua {i}" for i in range(num_texts)), "utf-8")
    config = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    fields = config["model"]["init_args"]["from_config"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"model_type": fields["model_type"], "max_position_embeddings": 64, **sizes}
    if "num_experts" in fields:
        experts = {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 8}
        small = {**fields, **small, **experts}
    flags = ["--data.path", str(file), "--data.max_length", "64", "--data.epochs", "20"]
    return [*flags, "--model.tokenizer", str(TOKENIZER), "--model.from_config", json.dumps(small)]


def stand_ins(name: str, tmp_path: Path, num_train: int = 500) -> list[str]:
    if name == "quickstart":
        return []
    if name == "quickstart_dpo":  # the rows are shipped, the model it goes on from is not
        save_small_model(tmp_path / "model", max_position_embeddings=128)
        return ["--model.model_name_or_path", str(tmp_path / "model")]
    if name.startswith("pretrain"):
        return stand_in_texts(name, tmp_path, num_train)
    model = ["--model.model_name_or_path", str(stand_in_model(name, tmp_path / "model"))]
    if name == "gpt2_id_sft":
        return [*model, "--data.sources", stand_in_sources(name, tmp_path, num_train)]
    return [
        *model,
        *("--data.path", stand_in_rows(name, tmp_path, num_train), "--data.revision", "null"),
    ]


def test_there_are_configs() -> None:
    names = [
        "gpt2_id_sft",
        "hh_dpo",
        "phi2_dpo",
        "phi2_xsum",
        "pretrain_150m",
        "pretrain_150m_llama",
        "pretrain_moe",
        "quickstart",
        "quickstart_dpo",
        "qwen_coder_chat",
    ]
    assert [path.stem for path in CONFIGS] == names
    assert all(len(path.read_text().splitlines()) <= 60 for path in CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_three_real_steps(
    command_line: CommandLine, tmp_path: Path, config: Path
) -> None:
    args = [*stand_ins(config.stem, tmp_path), "--trainer.max_steps", "3"]
    args += ["--trainer.log_every_n_steps", "1", "--generations.max_new_tokens", "2"]
    outcome = command_line("fit", "--config", config, *args)
    assert outcome.code == 0, outcome.err
    assert [row["step"] for row in outcome.metrics(config.stem)] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "vocabulary", "weights"),
    [
        ("pretrain_150m", 32_000, 184_973_312),
        ("pretrain_150m_llama", 32_000, 183_985_152),
        ("pretrain_moe", 4_754, 166_758_144),
    ],
)
def test_pretraining_at_its_full_size_takes_three_real_steps(
    command_line: CommandLine, tmp_path: Path, name: str, vocabulary: int, weights: int
) -> None:
    texts = stand_in_texts(name, tmp_path, 4000)[:2]
    tokenizer = tmp_path / "tokenizer"
    train = ["--input", json.dumps([texts[1]]), "--output", str(tokenizer)]
    assert command_line("train-tokenizer", *train, "--vocab_size", 264).code == 0
    args = [*texts, "--model.tokenizer", str(tokenizer), "--data.batch_size", "2"]
    args += ["--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1", "--generations.rows"]
    config = REPOSITORY / "configs" / f"{name}.yaml"
    sizes = ["--model.config.vocab_size", vocabulary]
    outcome = command_line("fit", "--config", config, *args, "0", *sizes)
    assert outcome.code == 0, outcome.err
    assert f"weights: {weights:,}" in outcome.out
    losses = [float(row["train/loss"]) for row in outcome.metrics(name) if row["train/loss"]]
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_behind_an_experiment_makes_its_model_as_large_as_it_says(
    command_line: CommandLine, tmp_path: Path, size: str
) -> None:
    file = REPOSITORY / "configs" / "sizes" / f"{size}.yaml"
    fields = yaml.safe_load(file.read_text())["model"]["init_args"]["from_config"]
    vocabulary, weights = SIZES[size]
    config = AutoConfig.for_model(**fields, vocab_size=vocabulary)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == weights
    if size != "10m":
        return
    texts = stand_in_texts("pretrain_150m", tmp_path, 100)[:-1]
    experiment = ["--config", REPOSITORY / "configs" / "pretrain_150m.yaml", "--config", file]
    args = [*texts[:-1], "--trainer.max_steps", 1, "--generations.rows", 0]
    outcome = command_line("fit", *experiment, *args)
    assert outcome.code == 0, outcome.err
    assert "fit: new llama, random weights" in outcome.out
    fewer = vocabulary - len(AutoTokenizer.from_pretrained(TOKENIZER))
    assert f"weights: {weights - fewer * fields['hidden_size']:,}, " in outcome.out


def test_phi2_xsum_runs_its_schedule_to_the_end_and_its_report_says_so(
    command_line: CommandLine, tmp_path: Path
) -> None:
    args = [*stand_ins("phi2_xsum", tmp_path, num_train=5000), "--test_at_end", "true"]
    args += ["--generations.rows", "2", "--generations.max_new_tokens", "4"]
    args += [
        "--trainer.log_every_n_steps",
        "100",
        "--report",
        "en",
        "--purpose",
        "Summaries in one sentence.",
    ]
    args += ["--targets", '{"val/loss": 100, "test/loss": 0.001}', "--licences", "{all: MIT}"]
    config = REPOSITORY / "configs" / "phi2_xsum.yaml"
    outcome = command_line("fit", "--config", config, *args)
    assert outcome.code == 0, outcome.err
    rates = {
        int(row["step"]): float(row["lr"]) for row in outcome.metrics("phi2_xsum") if row["lr"]
    }
    shown = {step: f"{rate:.2e}" for step, rate in rates.items()}
    first = {step: shown[step] for step in (100, 200, 300, 400, 500)}
    expected = ("1.96e-04", "1.69e-04", "1.21e-04", "6.70e-05", "2.28e-05")
    assert tuple(first.values()) == expected
    record = outcome.run("phi2_xsum").read()
    assert record["num_steps"] == 625
    assert record["num_rows"] == {"train": 5000, "validation": 4, "test": 4}
    validated = [int(row["step"]) for row in outcome.metrics("phi2_xsum") if row["val/loss"]]
    assert validated == [500, 625]
    check_every_item(outcome.run("phi2_xsum"), outcome.metrics("phi2_xsum"))


def test_targets_are_reached_or_missed(command_line: CommandLine, fit_args: list[str]) -> None:
    targets = '{"val/loss": 100, "val/token_accuracy": 1.5}'
    outcome = command_line("fit", *fit_args, "--targets", targets)
    assert outcome.code == 0, outcome.err
    assert "target val/loss 100: reached with" in outcome.out
    assert "target val/token_accuracy 1.5: missed with" in outcome.out
    again = ["fit", "--config", outcome.run().path / "config.yaml", "--ckpt_path", "last"]
    finished = command_line(*again, root=False)
    assert "this run is finished" in finished.out
    assert "target val/loss 100: reached with" in finished.out


def test_targets_of_pairs_know_which_way_is_better(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    metrics = {"val/rewards_margin": 0.06, "val/rewards_accuracy_low": 0.34, "val/loss": 0.7}
    run.update({"results": [{"split": "validation", "metrics": metrics}]})
    targets = {"val/rewards_margin": 1.0, "val/rewards_accuracy_low": 0.1, "val/loss": 0.5}
    assert [line.split()[3] for line in reached(run, targets)] == ["missed", "reached", "missed"]


def test_the_precision_that_ran_is_said_and_saved(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 1)
    assert "precision: 32-true (the default on a CPU)" in outcome.out
    assert "precision: 32-true" in (outcome.run().path / "config.yaml").read_text()
    asked = command_line(
        "fit", *fit_args, "--trainer.max_steps", 1, "--trainer.precision", "bf16-mixed"
    )
    assert "precision: bf16-mixed (as asked)" in asked.out
