"""What one run gives: a folder with everything in it, checkpoints any tool opens, numbers that can be read."""

import json
from pathlib import Path

import pytest
import torch
from harness import TOKENIZER, CommandLine, assert_same_weights, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_run_is_a_folder(command_line: CommandLine, fit_args: list[str]) -> None:
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 0, outcome.err
    run = outcome.run()
    record = run.read()
    assert record["status"] == "finished"
    steps = [int(row["step"]) for row in outcome.metrics()]
    assert steps == list(range(1, record["num_steps"] + 1))
    per_epoch = record["steps_per_epoch"]
    validated = [int(row["step"]) for row in outcome.metrics() if row["val/loss"]]
    assert validated == [per_epoch, 2 * per_epoch]
    assert float(outcome.metrics()[per_epoch - 1]["epoch"]) == 1
    names = {path.name for path in run.path.iterdir()}
    assert {"config.yaml", "metrics.csv", "train.log", "run.json", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (
        f"next: python -m fine_tune test --config {run.path}/config.yaml --ckpt_path best"
        in outcome.out
    )
    assert "left" in (run.path / "train.log").read_text()
    assert not [
        r for r in record["results"] if r["split"] == "test"
    ]  # the test split was not touched


def test_the_learning_rate_of_a_row_is_the_one_used(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line(
        "fit", *fit_args, "--model.warmup_steps", 2, "--model.lr_scheduler", "linear"
    )
    rates = [float(row["lr"]) for row in outcome.metrics()]
    total = len(rates)
    expected = [0, 0.5e-3, *[1e-3 * (total - step) / (total - 2) for step in range(2, total)]]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_a_full_checkpoint_opens_in_transformers(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args).run()
    best = run.checkpoint("best")
    assert best is not None
    assert best.name.startswith("epoch=")
    model = AutoModelForCausalLM.from_pretrained(best)
    AutoTokenizer.from_pretrained(best)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_lora_checkpoint_holds_the_adapter_only_and_opens_in_peft(
    command_line: CommandLine, fit_args: list[str], model_folder: Path
) -> None:
    lora = ["--model.lora.r", 4, "--model.lora.target_modules", '["q_proj","v_proj"]']
    outcome = command_line("fit", *fit_args, *lora)
    assert outcome.code == 0, outcome.err
    best = outcome.run().checkpoint("best")
    assert best is not None
    weights = load_file(best / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x targets x (A, B)
    assert all("lora_" in name for name in weights)
    assert not (best / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    PeftModel.from_pretrained(base, best)
    tested = command_line("test", *fit_args, *lora, "--ckpt_path", "best")
    assert tested.code == 0, tested.err


def test_test_writes_into_the_runs_folder(command_line: CommandLine, fit_args: list[str]) -> None:
    run = command_line("fit", *fit_args).run()
    before = (run.path / "metrics.csv").read_text()
    outcome = command_line(
        "test", "--config", run.path / "config.yaml", "--ckpt_path", "best", root=False
    )
    assert outcome.code == 0, outcome.err
    result = run.read()["results"][-1]
    assert result["split"] == "test"
    assert result["checkpoint"] == run.read()["best"]
    assert set(result["metrics"]) == {
        "test/loss", "test/perplexity", "test/token_accuracy", "test/exact_match",
    }  # fmt: skip
    assert (run.path / "metrics.csv").read_text() == before
    assert not (run.path.parent / "version_1").exists()


def test_from_a_yaml_test_takes_the_newest_version_with_a_checkpoint(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    command_line("fit", *fit_args)
    command_line("fit", *fit_args)
    outcome = command_line("test", *fit_args, "--ckpt_path", "last")
    assert outcome.code == 0
    assert "version_1" in outcome.out
    assert [r["split"] for r in outcome.run(version=1).read()["results"]] == ["validation", "test"]


def test_the_saved_config_runs_again_unchanged(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args).run()
    again = command_line("fit", "--config", run.path / "config.yaml", root=False)
    assert again.code == 0, again.err
    first, second = ((again.run(version=v).path / "config.yaml").read_text() for v in (0, 1))
    assert first == second
    assert_same_weights(run.checkpoint("last"), again.run(version=1).checkpoint("last"))


def test_only_max_steps_takes_as_many_epochs_as_it_needs(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, "--data.epochs", "null", "--trainer.max_steps", 11]
    outcome = command_line("fit", *args)
    assert [int(row["step"]) for row in outcome.metrics()] == list(range(1, 12))
    assert float(outcome.metrics()[-1]["epoch"]) > 2


def test_max_steps_inside_the_warm_up_warns_and_runs(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--model.warmup_steps", 6, "--trainer.max_steps", 3)
    assert outcome.code == 0
    assert outcome.out.count("inside its warm-up of 6 steps") == 1


def test_with_split_none_every_row_trains(command_line: CommandLine, fit_args: list[str]) -> None:
    outcome = command_line("fit", *fit_args, "--data.split", "none")
    assert outcome.code == 0, outcome.err
    assert outcome.run().read()["num_rows"] == {"train": 40}
    assert outcome.run().checkpoint("last") is not None
    assert outcome.run().checkpoint("best") == outcome.run().checkpoint("last")
    refused = command_line("fit", *fit_args, "--data.split", "none", "--early_stopping.patience", 2)
    assert refused.code == 2
    assert "early_stopping.patience" in refused.err
    nothing = command_line("test", *fit_args, "--data.split", "none", "--ckpt_path", "best")
    assert nothing.code == 2
    assert "nothing to test" in nothing.err


def test_early_stopping_ends_a_run_that_no_longer_improves(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    stopping = [
        "--early_stopping.patience",
        1,
        "--early_stopping.min_delta",
        100,
        "--data.epochs",
        9,
    ]
    outcome = command_line("fit", *fit_args, *stopping)
    record = outcome.run().read()
    assert outcome.code == 0
    assert record["status"] == "finished"
    assert record["step"] == 2 * record["steps_per_epoch"]


def test_checkpoints_are_kept_by_number_and_the_last_always(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    keep = ["--checkpoint.every", 1, "--checkpoint.keep", 2, "--trainer.val_check_interval", 2]
    record = command_line("fit", *fit_args, *keep, "--model.optimizer.lr", 0.05).run().read()
    scores = {c["name"]: c["score"] for c in record["checkpoints"]}
    assert record["last"].endswith(f"step={record['num_steps']}")
    assert record["best_score"] == min(score for score in scores.values() if score is not None)
    assert len(scores) <= 3


def test_test_at_end_measures_the_test_split_once(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    record = command_line("fit", *fit_args, "--test_at_end", "true").run().read()
    assert [result["split"] for result in record["results"]] == ["validation", "test"]


def test_answers_before_and_after_are_kept_and_not_asked_twice(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    rows = [
        "--generations.rows",
        2,
        "--generations.max_new_tokens",
        4,
        "--generations.test_rows",
        3,
    ]
    outcome = command_line("fit", *fit_args, *rows)
    file = outcome.run().path / "generations.jsonl"
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    best = outcome.run().read()["best"]
    assert [a["stage"] for a in answers] == ["before", "before", f"after {best}", f"after {best}"]
    fields = {"stage", "row_id", "prompt", "expected", "max_new_tokens", "answer", "exact_match"}
    assert set(answers[0]) == fields
    assert "asked" in outcome.out
    for _ in range(2):
        config = outcome.run().path / "config.yaml"
        tested = command_line("test", "--config", config, "--ckpt_path", "best", root=False)
        assert tested.code == 0, tested.err
    assert len(file.read_text().splitlines()) == 4 + 3


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW"])
def test_bitsandbytes_optimizers_train(
    command_line: CommandLine, fit_args: list[str], optimizer: str
) -> None:
    args = [*fit_args, "--model.optimizer", f"bitsandbytes.optim.{optimizer}"]
    outcome = command_line("fit", *args, "--model.optimizer.lr", 1e-2, "--data.epochs", 4)
    assert outcome.code == 0, outcome.err
    losses = [float(row["train/loss"]) for row in outcome.metrics()]
    assert losses[-1] < losses[0] - 0.5


def test_a_new_model_takes_its_vocabulary_from_the_tokenizer(
    command_line: CommandLine, fit_args: list[str], model_folder: Path
) -> None:
    fields = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    args = [
        *fit_args,
        "--model.model_name_or_path",
        "null",
        "--model.from_config",
        json.dumps(fields),
    ]
    outcome = command_line("fit", *args, "--model.tokenizer", model_folder)
    assert outcome.code == 0, outcome.err
    config = json.loads((outcome.run().checkpoint("last") / "config.json").read_text())  # type: ignore[operator]
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(model_folder))
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(model_folder).eos_token_id


def test_a_mixture_draws_rows_by_weight(
    command_line: CommandLine, fit_args: list[str], rows_file: Path, tmp_path: Path
) -> None:
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"hai {i}"},
                {"role": "assistant", "content": "halo"},
            ]
        }
        for i in range(40)
    ]
    other = write_rows(tmp_path / "chat.jsonl", chat)
    sources = [
        {"path": str(rows_file), "prompt": "{question}", "completion": "{answer}", "weight": 2},
        {"path": str(other), "weight": 0.5},
    ]
    keep = [arg for arg in fit_args if not arg.startswith(("--data.p", "--data.c"))]
    keep = [arg for arg in keep if arg not in (str(rows_file), "{question}", " {answer}")]
    outcome = command_line("fit", *keep, "--data.sources", json.dumps(sources), "--data.epochs", 1)
    assert outcome.code == 0, outcome.err
    record = outcome.run().read()
    assert record["num_rows"]["train"] > 50
    assert record["num_steps"] == pytest.approx((2 + 0.5) * 32 / 8, abs=2)


def test_templates_on_the_command_line_are_text(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    templates = ["--data.prompt", "Soal: {question}\nJawab:", "--data.completion= {answer}\n"]
    outcome = command_line("fit", *fit_args, *templates, "--generations.rows", 1)
    assert outcome.code == 0, outcome.err
    first = json.loads((outcome.run().path / "generations.jsonl").read_text().splitlines()[0])
    assert first["prompt"].startswith("Soal: Berapa")
    assert first["prompt"].endswith("\nJawab:")
    again = command_line("fit", "--config", outcome.run().path / "config.yaml", root=False)
    assert again.metrics(version=1)[-1]["train/loss"] == again.metrics(version=0)[-1]["train/loss"]


def test_loggers_plugins_and_callbacks_of_the_user_join_ours(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "theirs")},
    }
    plugin = {
        "class_path": "lightning.pytorch.plugins.MixedPrecision",
        "init_args": {"precision": "bf16-mixed", "device": "cpu"},
    }
    theirs = [
        *("--trainer.logger", json.dumps([logger]), "--trainer.plugins", json.dumps(plugin)),
        *("--trainer.callbacks", "lightning.pytorch.callbacks.Timer"),
        *("--trainer.enable_progress_bar", "false"),
    ]
    outcome = command_line("fit", *fit_args, *theirs)
    assert outcome.code == 0, outcome.err
    assert "bf16-mixed" in outcome.out
    assert list((tmp_path / "theirs").rglob("metrics.csv"))
    assert len(outcome.metrics()) == outcome.run().read()["num_steps"]
    assert outcome.run().checkpoint("best") is not None


def test_a_split_may_leave_a_part_out(command_line: CommandLine, fit_args: list[str]) -> None:
    outcome = command_line("fit", *fit_args, "--data.split", '{"train": 0.7, "validation": 0.3}')
    assert outcome.code == 0, outcome.err
    assert set(outcome.run().read()["num_rows"]) == {"train", "validation"}


def test_a_runs_config_means_its_best_checkpoint(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args).run()
    outcome = command_line("test", "--config", run.path / "config.yaml", root=False)
    assert outcome.code == 0, outcome.err
    assert run.read()["results"][-1]["checkpoint"] == run.read()["best"]


def test_only_folders_of_the_record_are_removed(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--data.epochs", 1).run()
    (run.checkpoints / "my-backup").mkdir()
    longer = ["--data.epochs", 3, "--ckpt_path", "last"]
    assert command_line("fit", "--config", run.path / "config.yaml", *longer, root=False).code == 0
    assert (run.checkpoints / "my-backup").is_dir()


def test_a_copied_checkpoint_starts_a_version_of_its_own(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    import shutil

    run = command_line("fit", *fit_args, "--data.epochs", 1).run()
    shutil.copytree(run.checkpoint("last"), tmp_path / "mine")  # type: ignore[arg-type]
    outcome = command_line("fit", *fit_args, "--ckpt_path", tmp_path / "mine")
    assert outcome.code == 0, outcome.err
    assert [int(row["step"]) for row in outcome.metrics(version=1)] == list(range(6, 11))


def test_equal_prompts_are_answered_and_counted_each(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    rows = [{"question": "sama", "answer": str(i)} for i in range(4)]
    files = {"train": "train", "validation": "train", "test": "test"}
    for name in set(files.values()):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    paths = json.dumps({split: str(tmp_path / f"{name}.jsonl") for split, name in files.items()})
    args = ["--data.path", paths, "--generations.test_rows", "all", "--test_at_end", "true"]
    outcome = command_line("fit", *fit_args, *args)
    assert outcome.code == 0, outcome.err
    lines = (outcome.run().path / "generations.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert sorted(a["expected"] for a in answers) == ["0", "1", "2", "3"]
    share = sum(a["exact_match"] for a in answers) / 4
    assert outcome.run().read()["results"][-1]["metrics"]["test/exact_match"] == pytest.approx(
        share
    )


def test_answers_stay_within_the_models_positions(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    fields = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    args = ["--model.model_name_or_path", "null", "--model.from_config", json.dumps(fields)]
    tokenizer = ["--model.tokenizer", TOKENIZER, "--generations.rows", 4]
    outcome = command_line("fit", *fit_args, *args, *tokenizer)
    assert outcome.code == 0, outcome.err
