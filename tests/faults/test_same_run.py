"""A run goes on as the same run: what makes it one is held against its checkpoint before weights load."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from harness import CommandLine, Outcome
from safetensors.torch import load_file, save_file
from test_resume import stop_at

from fine_tune import models
from fine_tune.callbacks.step_rows import rows_of_step

EVERY = ["--checkpoint.every", "2"]


@pytest.fixture
def half_done(command_line: CommandLine, fit_args: list[str]) -> Outcome:
    """The first of two epochs, five steps each."""
    outcome = command_line("fit", *fit_args, *EVERY, "--data.epochs", "1")
    assert outcome.code == 0, outcome.err
    assert outcome.run().read()["num_steps"] == 5
    return outcome


def resume(command_line: CommandLine, run: Any, *more: object) -> Outcome:
    config = run.path / "config.yaml"
    longer = ["--data.epochs", "2", "--ckpt_path", "last"]
    return command_line("fit", "--config", config, *longer, *more, root=False)


CHANGED = [
        ("--model.optimizer.weight_decay", "0.3", "model.optimizer.weight_decay: the checkpoint was trained with 0.01"),
        ("--model.optimizer", "torch.optim.SGD", "model.optimizer: the checkpoint was trained with torch.optim.adamw"),
        ("--model.lr_scheduler", "linear", "model.lr_scheduler: the checkpoint was trained with cosine"),
        ("--model.warmup_steps", "1", "model.warmup_steps: the checkpoint was trained with nothing, this run"),
        ("--model.config.attention_dropout", "0.1", "model.config.attention_dropout: the checkpoint was"),
        ("--model.lora.r", "4", "model.lora.r: the checkpoint was trained with nothing"),
        ("--data.prompt", "Soal: {question}", "data.prompt: the checkpoint was trained with {question}"),
        ("--data.split", "{train: 0.5, validation: 0.5}", "data.split.train: the checkpoint was trained with nothing"),
        ("--data.batch_size", "4", "data.batch_size: the checkpoint was trained with 8"),
        ("--data.seed", "7", "data.seed: the checkpoint was trained with 42"),
        ("--seed_everything", "7", "seed_everything: the checkpoint was trained with 42"),
        ("--data.max_length", "40", "data.max_length: the checkpoint was trained with 128"),
        ("--trainer.gradient_clip_val", "0.5", "trainer.gradient_clip_val: the checkpoint was trained with nothing"),
]  # fmt: skip


def test_another_setting_is_refused_by_name_before_weights_load(
    command_line: CommandLine, half_done: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = half_done.run()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    monkeypatch.setattr("fine_tune.models.load_model", lambda *_, **__: pytest.fail("weights"))
    for flag, value, message in CHANGED:
        refused = resume(command_line, run, flag, value)
        assert refused.code == 2
        assert message in refused.err
        assert "--allow_changes true" in refused.err
    after = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    assert after == before


def test_all_weights_are_loaded_once_and_from_the_checkpoint(
    command_line: CommandLine, half_done: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loaded = half_done.run(), []
    last = run.checkpoint("last")
    assert last is not None

    def load(config: Any, name: str, **options: Any) -> Any:
        loaded.append(name)
        return models.load_model(config, name, **options)

    monkeypatch.setattr(
        "fine_tune.modules.weights.models", SimpleNamespace(**{**vars(models), "load_model": load})
    )
    resumed = resume(command_line, run)
    assert resumed.code == 0, resumed.err
    assert loaded == [str(last.resolve())]


def test_all_differences_are_listed_at_once(command_line: CommandLine, half_done: Outcome) -> None:
    changes = ["--data.seed", "7", "--model.optimizer.lr", "0.5", "--model.lr_scheduler", "linear"]
    refused = resume(command_line, half_done.run(), *changes)
    for key in ("data.seed", "model.optimizer.lr", "model.lr_scheduler"):
        assert refused.err.count(f"error: {key}: ") == 1


def test_a_changed_data_file_is_refused_by_name(
    command_line: CommandLine, half_done: Outcome, rows_file: Path
) -> None:
    lines = rows_file.read_text().splitlines()
    rows_file.write_text("\n".join([*lines[:-1], lines[-1].replace("Berapa", "Hitung")]) + "\n")
    refused = resume(command_line, half_done.run())
    assert refused.code == 2
    assert f"data: {rows_file}: the checkpoint was trained with" in refused.err
    assert "SHA-256" in refused.err


def test_other_weights_in_the_models_folder_are_refused(
    command_line: CommandLine, fit_args: list[str], model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "own_model")
    lora = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj"]']
    args = [*fit_args, *EVERY, *lora, "--model.model_name_or_path", str(folder)]
    run = command_line("fit", *args, "--data.epochs", "1").run()
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused = resume(command_line, run)
    assert refused.code == 2
    assert "model.weights: the checkpoint was trained with" in refused.err


def test_a_moved_model_and_moved_data_are_the_same_run(
    command_line: CommandLine,
    half_done: Outcome,
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "elsewhere")
    rows = rows_file.rename(tmp_path / "renamed.jsonl")
    moved = ["--model.model_name_or_path", model, "--data.path", rows]
    resumed = resume(command_line, half_done.run(), *moved)
    assert resumed.code == 0, resumed.err
    assert resumed.run().read()["step"] == 10


FREE = [
    *("--data.max_tokens_per_micro_batch", "64", "--data.num_workers", "1", "--data.eval_batch_size", "3"),
    *("--trainer.val_check_interval", "3", "--trainer.log_every_n_steps", "2"),
    *("--model.attn_implementation", "eager", "--model.gradient_checkpointing", "true"),
    *("--checkpoint.every", "1", "--checkpoint.keep", "2", "--generations.rows", "1"),
]  # fmt: skip


def test_what_does_not_make_the_run_may_change(
    command_line: CommandLine, half_done: Outcome
) -> None:
    resumed = resume(command_line, half_done.run(), *FREE)
    assert resumed.code == 0, resumed.err
    changes = resumed.run().read()["changes"]
    assert [(c["key"], c["from"], c["to"]) for c in changes] == [
        ("data.epochs, trainer.max_steps", 5, 10)
    ]


def test_another_precision_is_recorded_with_its_step(
    command_line: CommandLine, half_done: Outcome
) -> None:
    resumed = resume(command_line, half_done.run(), "--trainer.precision", "bf16-mixed")
    assert resumed.code == 0, resumed.err
    assert "trainer.precision: the checkpoint was trained with 32-true, this run" in resumed.out
    recorded = {c["key"]: c for c in resumed.run().read()["changes"]}
    assert recorded["trainer.precision"] == {
        "step": 5, "key": "trainer.precision", "from": "32-true", "to": "bf16-mixed",
        "allowed_by": "being free to change",
    }  # fmt: skip


def test_an_allowed_change_takes_effect_and_is_recorded_with_its_step(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    constant = [*fit_args, *EVERY, "--model.lr_scheduler", "constant", "--data.epochs", "1"]
    run = command_line("fit", *constant).run()
    changed = ["--model.optimizer.lr", "5e-4", "--model.optimizer.weight_decay", "0.3"]
    resumed = resume(command_line, run, *changed, "--allow_changes", "true")
    assert resumed.code == 0, resumed.err
    assert "WARNING: model.optimizer.lr: the checkpoint was trained with 0.001" in resumed.out
    rates = [float(row["lr"]) for row in resumed.metrics()]
    assert rates == pytest.approx([1e-3] * 5 + [5e-4] * 5)
    state = torch.load(run.checkpoint("last") / "training_state.pt", weights_only=True)  # type: ignore[operator]
    groups = state["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["initial_lr"] for group in groups] == [5e-4, 5e-4]
    recorded = {c["key"]: c for c in run.read()["changes"]}
    assert recorded["model.optimizer.lr"] == {
        "step": 5, "key": "model.optimizer.lr", "from": 1e-3, "to": 5e-4, "allowed_by": "--allow_changes",
    }  # fmt: skip
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    earlier = yaml.safe_load((run.path / "config_until_step_5.yaml").read_text())
    assert earlier["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert settings["allow_changes"] is False
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 5e-4
    again = command_line(
        "fit", "--config", run.path / "config.yaml", "--ckpt_path", "last", root=False
    )
    assert again.code == 0, again.err  # the changed run is the run now


def test_an_allowed_change_that_was_lost_in_a_kill_is_asked_for_again(
    command_line: CommandLine, half_done: Outcome
) -> None:
    run = half_done.run()
    with pytest.raises(RuntimeError, match="a defect"):  # before its first checkpoint
        resume(
            command_line,
            run,
            "--model.optimizer.lr",
            "5e-4",
            "--allow_changes",
            "true",
            *stop_at(6),
        )
    without = ["--model.optimizer.lr", "1e-3", "--trainer.callbacks", "null"]
    resumed = resume(command_line, run, *without)
    assert resumed.code == 0, resumed.err
    assert [c["key"] for c in run.read()["changes"]] == ["data.epochs, trainer.max_steps"]


def test_another_optimizer_starts_with_its_own_state_at_the_schedules_rate(
    command_line: CommandLine, half_done: Outcome
) -> None:
    other = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "2e-3"]
    resumed = resume(command_line, half_done.run(), *other, "--allow_changes", "true")
    assert resumed.code == 0, resumed.err
    assert "optimizer's state does not fit the new settings; it starts anew" in resumed.out
    rates = [float(row["lr"]) for row in resumed.metrics()]
    assert rates[5] == pytest.approx(1e-3)  # half of 2e-3: the cosine of 10 steps at its middle


def test_a_run_made_longer_follows_the_longer_schedule_from_its_first_step(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    linear = [*fit_args, "--model.lr_scheduler", "linear", "--data.epochs", "1"]
    run = command_line("fit", *linear).run()
    resumed = resume(command_line, run)
    assert resumed.code == 0, resumed.err
    rates = [float(row["lr"]) for row in resumed.metrics()]
    assert rates[5:] == pytest.approx([1e-3 * (10 - step) / 10 for step in range(5, 10)])


def test_a_run_made_shorter_is_refused(command_line: CommandLine, fit_args: list[str]) -> None:
    run = command_line("fit", *fit_args, *EVERY, "--early_stopping.patience", "1").run()
    run.update({"status": "running"})
    config = run.path / "config.yaml"
    shorter = ["--ckpt_path", "last", "--data.epochs", "1"]
    refused = command_line("fit", "--config", config, *shorter, root=False)
    assert refused.code == 2
    assert "data.epochs, trainer.max_steps: the checkpoint was trained with 10" in refused.err


@pytest.mark.parametrize(
    "other",
    [["--data.max_tokens_per_micro_batch", "70"], ["--data.num_workers", "2"]],
    ids=["micro-batch", "workers"],
)
def test_another_micro_batch_or_worker_count_takes_the_same_rows_in_the_same_order(
    command_line: CommandLine, fit_args: list[str], other: list[str]
) -> None:
    straight = command_line("fit", *fit_args, "--name", "straight")
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *fit_args, *EVERY, *stop_at(6), "--name", "other")
    resumed = command_line("fit", *fit_args, *other, "--ckpt_path", "last", "--name", "other")
    assert resumed.code == 0, resumed.err
    steps = range(1, 11)
    theirs, ours = (
        [rows_of_step(straight.run(name).path / "rows", step) for step in steps]
        for name in ("straight", "other")
    )
    assert theirs == ours
    losses = [
        [float(row["train/loss"]) for row in straight.metrics(name)]
        for name in ("straight", "other")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_identity_lies_in_the_checkpoint_under_its_hashes(half_done: Outcome) -> None:
    last = half_done.run().checkpoint("last")
    assert last is not None
    identity = json.loads((last / "run_identity.json").read_text())
    assert identity == half_done.run().read()["identity"]
    assert "run_identity.json" in (last / "manifest.json").read_text()
