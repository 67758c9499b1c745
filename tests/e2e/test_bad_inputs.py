"""What a user can get wrong: a message that says where, what and how to fix it; exit code 2; nothing written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import REPOSITORY, CommandLine, Outcome, write_rows
from small_models import save_small_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def refused(outcome: Outcome, *messages: str) -> None:
    assert outcome.code == 2, outcome.out
    for message in messages:
        assert message in outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    logs = outcome.root / "lightning_logs"
    assert [p.name for p in logs.glob("*") if p.name != ".cache"] == []


# ---- the command line and the YAML


def test_unknown_verb(command_line: CommandLine) -> None:
    refused(command_line("trian"), "unknown verb 'trian'")
    refused(command_line("vaildate"), "did you mean 'validate'?")


@pytest.mark.parametrize(
    ("flag", "value", "messages"),
    [
        ("--model.learing_rate", "1", ["unknown flag '--model.learing_rate' of SFT"]),
        ("--data.bath_size", "1", ["did you mean '--data.batch_size'?"]),
        ("--trainer.max_stepss", "1", ["did you mean '--trainer.max_steps'?"]),
        ("--model.optimizer.lrr", "1", ["unknown option 'lrr'; did you mean 'lr'?"]),
        ("--model.lora.rank_patern", "1", ["did you mean 'rank_pattern'?"]),
        ("--nmae", "x", ["unknown flag '--nmae'; did you mean 'name'?"]),
        ("--data.batch_size", "many", ["data.batch_size: Expected an int"]),
        ("--data.batch_size", "0", ["data.batch_size: must be at least 1, got 0"]),
        ("--model.optimizer.lr", "0", ["model.optimizer.lr: the learning rate must be above 0"]),
        ("--model.optimizer.lr", "-1", ["learning rate"]),
        ("--model.optimizer.lr", ".nan", ["learning rate"]),
        ("--model.optimizer", "os.system", ["'os.system' is not an optimizer"]),
        ("--model.lr_scheduler", "cosin", ["cosin", "cosine"]),
        ("--model.warmup_steps", "11", ["longer than the 10 steps of all epochs"]),
        (
            "--model.config.hiden_size",
            "3",
            ["has no field 'hiden_size'; did you mean 'hidden_size'?"],
        ),
        ("--data.max_length", "1000", ["more than the model's 256 positions"]),
        ("--data.split.train", "0.9", ["data.split"]),
        ("--trainer.max_epochs", "3", ["trainer.max_epochs", "set data.epochs"]),
        ("--trainer.check_val_every_n_epoch", "1", ["trainer.val_check_interval"]),
        ("--trainer.accumulate_grad_batches", "4", ["data.max_tokens_per_micro_batch"]),
        ("--trainer.accelerator", "gpu", ["cannot be had here", "0 CUDA device(s)"]),
        ("--trainer.val_check_interval", "0", ["trainer.val_check_interval"]),
        ("--trainer.log_every_n_steps", "0", ["trainer.log_every_n_steps: must be at least 1"]),
        ("--trainer.max_steps", "0", ["trainer.max_steps: must be at least 1"]),
        ("--trainer.max_time", "abc", ["these settings cannot be had here"]),
        ("--trainer.strategy", "foo", ["these settings cannot be had here"]),
        ("--trainer.val_check_interval", "00:00:00:01", ["give optimizer steps"]),
        ("--trainer.gradient_clip_val", "-1", ["must not be negative"]),
        (
            "--early_stopping.monitor",
            "val/los",
            ["early_stopping.monitor", "did you mean 'val/loss'?"],
        ),
        ("--seed_everything", "-1", ["seed_everything"]),
        ("--model.optimizer", "torch.optim.LBFGS", ["model.optimizer", "parameter groups"]),
        ("--data.path", "", ["data.path: is empty"]),
        ("--data.split", "{train: .nan, validation: 0.1}", ["data.split"]),
        ("--name", "../x", ["name: '../x' is not allowed"]),
        ("--model", "fine_tune.modules.STF", ["did you mean 'fine_tune.modules.SFT'?"]),
        ("--model.lora.target_modules", '["query"]', ["q_proj", "down_proj"]),
        ("--early_stopping.patience", "0", ["early_stopping.patience"]),
        ("--checkpoint.keep", "0", ["checkpoint: every"]),
        ("--ckpt_path", "last", ["no unfinished run(s) of 'run'"]),
        ("--ckpt_path", "nowhere/step=3", ["ckpt_path: 'nowhere/step=3' does not exist"]),
        (
            "--model.tokenizer",
            "nowhere/at/all",
            ["model.tokenizer: folder 'nowhere/at/all' does not exist"],
        ),
        ("--data.path", "nowhere.jsonl", ["data.path: 'nowhere.jsonl' does not exist"]),
        ("--data.group_by", "[a, b]", ["data.group_by: Expected a str"]),
        (
            "--data.group_by",
            "questoin",
            ["data.group_by: the field 'questoin' is missing", "did you mean"],
        ),
        ("--data.split", "random", ["data.split: give ratios like {train: 0.8", "got 'random'"]),
        ("--data.split", "{train: 80, validation: 10, test: 10}", ["or as shares: {'train': 0.8"]),
        ("--data.max_length", "2", ["data.max_length: no rows are left", "no row fits 2 tokens"]),
        ("--model.lora", "atuo", ["model.lora: give auto, or LoRA's own settings", "got 'atuo'"]),
        ("--model.lora=auto", "--model.lora.r=32", ["model.lora.r: model.lora: auto chooses it"]),
        ("--targets", "{val_loss: 1}", ["'val_loss' is not measured; did you mean 'val/loss'?"]),
        ("--data.prompt", "{qestion}", ["wants the field 'qestion'", "did you mean 'question'?"]),
    ],
)
def test_a_wrong_flag(
    command_line: CommandLine, fit_args: list[str], flag: str, value: str, messages: list[str]
) -> None:
    refused(command_line("fit", *fit_args, flag, value), *messages)


def test_all_mistakes_of_a_yaml_at_once_with_their_lines(
    command_line: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        """\
name: wrong
model:
  class_path: fine_tune.modules.SFT
  init_args:
    model_name_or_path: somewhere
    gradient_checkpoint: true
data:
  class_path: fine_tune.data.SFTData
  init_args:
    path: rows.jsonl
    epochs: two
trainer:
  max_steps: 3
  max_steps: 4
checkpoints: {every: 3}
"""
    )
    refused(
        command_line("fit", "--config", file),
        f"{file}:6: unknown key 'gradient_checkpoint' of SFT; did you mean 'gradient_checkpointing'?",
        f"{file}:11: data.epochs: Expected an int",
        f"{file}:14: duplicate key 'max_steps'",
        f"{file}:15: unknown key 'checkpoints'; did you mean 'checkpoint'?",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a", "wrong.yaml:2: YAML"),
        (
            "name: !!python/object/apply:os.system ['true']",
            "wrong.yaml:1: YAML: could not determine",
        ),
        ("- a\n- b\n", "a mapping of keys is wanted"),
        (
            "data: {class_path: fine_tune.data.SFTData, init_args: {path: hf_abcdefghijklmnopqrstuvwx}}",
            "secret",
        ),
    ],
)
def test_a_yaml_that_cannot_be_read(
    command_line: CommandLine, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(text + "\n")
    refused(command_line("fit", "--config", tmp_path / "wrong.yaml"), message)


def test_a_config_that_is_not_there(command_line: CommandLine) -> None:
    refused(command_line("fit", "--config", "nowhere.yaml"), "'nowhere.yaml' cannot be read")


def test_options_that_exclude_each_other_are_both_named(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    both = ["--model.warmup_steps", 1, "--model.warmup_ratio", 0.1]
    refused(command_line("fit", *fit_args, *both), "model.warmup_steps, model.warmup_ratio")
    both = ["--model.from_config", '{"model_type": "llama"}']
    refused(command_line("fit", *fit_args, *both), "model.model_name_or_path, model.from_config")


# ---- data


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", ["the file is empty"]),
        (b'{"question": "a", "answer": "b"}\n{"question": \n', ["rows.jsonl:2: broken JSON"]),
        (b'{"question": "\xff\xfe", "answer": "b"}\n', ["rows.jsonl:1: not UTF-8", "0xff"]),
        (
            b'{"question": "a", "answer": "b"}\n\n{"question": null, "answer": "c"}\n',
            ["rows.jsonl:3", "null"],
        ),
        (b'{"question": "a", "answer": ""}\n', ["rows.jsonl:1: the completion is empty"]),
        (
            b'{"question": ["a"], "answer": "b"}\n',
            ["rows.jsonl:1", "must be a text or a number, got list"],
        ),
        (b'{"soal": "a", "answer": "b"}\n', ["wants the field 'question'", "['answer', 'soal']"]),
        (b'{"question": "a", "answer": "b"}\n', ["no rows are left for"]),
    ],
    ids=["empty", "broken", "utf8", "null", "empty answer", "type", "field", "too few"],
)
def test_broken_rows(
    command_line: CommandLine,
    fit_args: list[str],
    rows_file: Path,
    content: bytes,
    messages: list[str],
) -> None:
    rows_file.write_bytes(content)
    refused(command_line("fit", *fit_args), *messages)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["user"], "no assistant turn"),
        (["user", "user", "assistant"], "second user turn in a row"),
        (["user", "assistent"], "did you mean 'assistant'?"),
    ],
)
def test_broken_conversations(
    command_line: CommandLine, fit_args: list[str], rows_file: Path, roles: list[str], message: str
) -> None:
    rows = [{"messages": [{"role": role, "content": f"x{i}"} for role in roles]} for i in range(30)]
    write_rows(rows_file, rows)
    outcome = command_line("fit", *without(fit_args, "--data.prompt", "--data.completion"))
    refused(outcome, f"{rows_file}:1: ", message)
    assert outcome.err.count("error:") <= 10


def test_a_conversation_without_a_chat_template(
    command_line: CommandLine,
    fit_args: list[str],
    rows_file: Path,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(rows_file, [{"messages": turns}] * 30)
    args = without(fit_args, "--data.prompt", "--data.completion")
    outcome = command_line(
        "fit", *args, "--model.tokenizer", tmp_path / "plain", "--data.split", "none"
    )
    refused(outcome, "no chat template")


def test_a_prompt_that_alone_fills_max_length_is_shown(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = ["--data.max_length", 4, "--data.truncation", "completion_right"]
    refused(command_line("fit", *fit_args, *args), "the prompt alone fills it", "Berapa 0 + 0?")


# ---- models and tokenizers


@pytest.fixture
def broken_model(model_folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


def model_refused(
    command_line: CommandLine, fit_args: list[str], folder: Path, *messages: str
) -> None:
    refused(command_line("fit", *fit_args, "--model.model_name_or_path", folder), *messages)


def test_model_folder_absent(command_line: CommandLine, fit_args: list[str]) -> None:
    model_refused(
        command_line, fit_args, Path("/nowhere/model"), "folder '/nowhere/model' does not exist"
    )


def test_hub_model_offline(command_line: CommandLine, fit_args: list[str]) -> None:
    model_refused(
        command_line, fit_args, Path("owner/model"), "not in the hub's cache", "HF_HUB_OFFLINE"
    )


def test_pickled_weights(
    command_line: CommandLine, fit_args: list[str], broken_model: Path
) -> None:
    (broken_model / "model.safetensors").unlink()
    torch.save({}, broken_model / "pytorch_model.bin")
    model_refused(command_line, fit_args, broken_model, "only pickled weights", "save_pretrained")


def test_a_missing_shard(
    command_line: CommandLine, fit_args: list[str], broken_model: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(broken_model)
    (broken_model / "model.safetensors").unlink()
    model.save_pretrained(broken_model, max_shard_size="40KB")
    shard = sorted(broken_model.glob("model-*.safetensors"))[0]
    shard.unlink()
    model_refused(command_line, fit_args, broken_model, "shard(s) missing", shard.name)


def test_hub_code(command_line: CommandLine, fit_args: list[str], broken_model: Path) -> None:
    config = json.loads((broken_model / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "code.MyConfig"}}
    (broken_model / "config.json").write_text(json.dumps(config))
    (broken_model / "code.py").write_text("raise SystemExit('executed')")
    model_refused(command_line, fit_args, broken_model, "needs code from the hub", "never executed")


def test_hub_code_of_a_tokenizer(
    command_line: CommandLine,
    fit_args: list[str],
    broken_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, in a terminal
    file, executed = broken_model / "tokenizer_config.json", tmp_path / "executed"
    own = {"tokenizer_class": "My", "auto_map": {"AutoTokenizer": ["my_code.My", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (broken_model / "my_code.py").write_text(f"open({str(executed)!r}, 'w').close()")
    outcome = command_line("fit", *fit_args, "--model.model_name_or_path", broken_model)
    assert not executed.exists()
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"no tokenizer can be loaded from '{broken_model}'" in outcome.err


def test_weights_that_are_not_all_there(
    command_line: CommandLine, fit_args: list[str], broken_model: Path
) -> None:
    config = LlamaConfig.from_pretrained(broken_model)
    config.num_hidden_layers = 3
    config.save_pretrained(broken_model)
    outcome = command_line("fit", *fit_args, "--model.model_name_or_path", broken_model)
    assert outcome.code == 2
    assert "lacks" in outcome.err


def test_a_tokenizer_larger_than_the_embedding(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, model_folder: Path
) -> None:
    save_small_model(tmp_path / "small", vocab_size=20)
    args = ["--model.model_name_or_path", tmp_path / "small", "--model.tokenizer", model_folder]
    refused(command_line("fit", *fit_args, *args), "model's vocabulary has 20 entries")


def test_a_tokenizer_without_eos(
    command_line: CommandLine, fit_args: list[str], broken_model: Path
) -> None:
    config = json.loads((broken_model / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (broken_model / "tokenizer_config.json").write_text(json.dumps(config))
    model_refused(command_line, fit_args, broken_model, "has no EOS token")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "no causal language model 'lama'; did you mean 'llama'?"),
        ({"model_type": "llama", "hiden_size": 8}, "did you mean 'hidden_size'?"),
        ({"model_type": "llama", "hidden_size": "big"}, "hidden_size"),
        ({"class": "LlamaConfg"}, "no config class 'LlamaConfg'"),
        ({"hidden_size": 8}, "give either model_type"),
    ],
)
def test_a_new_models_fields(
    command_line: CommandLine,
    fit_args: list[str],
    model_folder: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    args = without(fit_args, "--model.model_name_or_path")
    args += ["--model.from_config", json.dumps(fields), "--model.tokenizer", str(model_folder)]
    refused(command_line("fit", *args), message)


def test_an_adapter_of_another_shape(command_line: CommandLine, fit_args: list[str]) -> None:
    lora = ["--model.lora.target_modules", '["q_proj"]']
    assert command_line("fit", *fit_args, *lora, "--model.lora.r", 4).code == 0
    outcome = command_line("test", *fit_args, *lora, "--model.lora.r", 8, "--ckpt_path", "best")
    assert outcome.code == 2
    assert "has r 4, the config gives 8" in outcome.err
    outcome = command_line("test", *fit_args, "--ckpt_path", "best")
    assert outcome.code == 2
    assert "holds an adapter, but the config trains full weights" in outcome.err


# ---- the process


def test_output_piped_into_head_ends_quietly() -> None:
    command = f"{sys.executable} -m fine_tune fit --help | head -1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout.startswith("usage: python -m fine_tune")
    assert done.stderr == ""


@pytest.mark.parametrize("flag", ["--data.help", "--model.help"])
def test_help_knows_a_class_by_its_name_alone(flag: str) -> None:
    name = {"--data.help": "TextData", "--model.help": "Pretrain"}[flag]
    command = [sys.executable, "-m", "fine_tune", "fit", flag, name]  # of its own: nothing imported
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"--data.help": "--data.curriculum", "--model.help": "--model.lora"}[flag] in done.stdout


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, fine_tune.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


def test_a_run_root_that_cannot_be_written(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file, where a folder should be")
    args = [*fit_args, "--trainer.default_root_dir", str(tmp_path / "file")]
    outcome = command_line("fit", *args, root=False)
    assert outcome.code == 2
    assert "cannot be written" in outcome.err


def without(args: list[str], *flags: str) -> list[str]:
    """Leave flags and their values out."""
    kept, skip = [], False
    for arg in args:
        if arg in flags:
            skip = True
        elif skip:
            skip = False
        else:
            kept.append(arg)
    return kept


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--model.lora", "auto", "--model", "SFT", "--data", "SFTData"],
            "like --model SFT --model.lora ...",
        ),
        (
            ["--model", "SFT", "--data.path", "x.jsonl", "--data", "SFTData"],
            "like --data SFTData --data.path ...",
        ),
    ],
)
def test_a_flag_before_its_class_is_told_so(
    command_line: CommandLine, flags: list[str], told: str
) -> None:
    outcome = command_line("fit", *flags)
    assert outcome.code == 2
    assert told in outcome.err and "NestedArg" not in outcome.err
