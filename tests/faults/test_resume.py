"""A killed run goes on as if it had not been killed: same rows, same losses, same weights, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine
from safetensors.torch import load_file
from small_models import save_small_model

from fine_tune.runs.run_folder import RunFolder

DROPOUT = ["--model.config.attention_dropout", "0.1", "--trainer.gradient_clip_val", "1.0"]
LORA = ["--model.lora.r", "4", "--model.lora.lora_dropout", "0.1"]
LORA += ["--model.lora.target_modules", '["q_proj", "v_proj"]']

QLORA = ["--model.quantization", "nf4", "--model.lora", "auto"]


def stop_at(step: int) -> list[str]:
    return ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", str(step)]


@pytest.mark.parametrize("step", [2, 5, 6, 10])  # the save of that very step is lost, too
def test_resuming_after_a_defect_equals_the_straight_run(
    command_line: CommandLine, fit_args: list[str], step: int
) -> None:
    every = ["--checkpoint.every", "1"]
    straight = command_line("fit", *fit_args, *DROPOUT, *every, "--name", "straight")
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *fit_args, *DROPOUT, *every, *stop_at(step))
    assert straight.run("run").read()["status"] == "failed"
    resumed = command_line("fit", *fit_args, *DROPOUT, *every, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_run(straight, resumed)


def test_a_mixture_of_experts_resumes_bit_for_bit_with_what_its_routers_did(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    save_small_model(tmp_path / "moe", "qwen3_moe", head_dim=8, norm_topk_prob=False, **experts)
    args = [*fit_args, "--model.model_name_or_path", tmp_path / "moe", "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    assert "train_experts/load_00" in straight.metrics("straight")[0]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop_at(5))
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("settings", [DROPOUT, LORA, QLORA, ["--data.num_workers", "2"]])
def test_resuming_after_sigkill_equals_the_straight_run(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, settings: list[str]
) -> None:
    args = [*fit_args, *settings, "--checkpoint.every", "3"]
    straight = command_line("fit", *args, "--name", "straight")
    assert straight.code == 0, straight.err
    killed = subprocess.run(
        [
            sys.executable,
            "-m",
            "fine_tune",
            "fit",
            *args,
            *stop_at(5),
            "--trainer.callbacks.kill",
            "true",
        ]
        + ["--trainer.default_root_dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [int(row["step"]) for row in straight.metrics("run")]
    assert steps == [1, 2, 3, 4]  # flushed row by row; step 5 was not yet logged
    config = straight.run("run").path / "config.yaml"
    args = ["--trainer.callbacks", "null", "--ckpt_path", "last"]
    resumed = command_line("fit", "--config", config, *args, root=False)
    assert resumed.code == 0, resumed.err
    assert_same_run(straight, resumed)


def test_a_run_can_be_extended(command_line: CommandLine, fit_args: list[str]) -> None:
    short = command_line("fit", *fit_args, "--model.lr_scheduler", "constant", "--data.epochs", "1")
    config = short.run().path / "config.yaml"
    longer = ["--data.epochs", "2", "--ckpt_path", "last"]
    extended = command_line("fit", "--config", config, *longer, root=False)
    assert extended.code == 0, extended.err
    straight = command_line(
        "fit", *fit_args, "--model.lr_scheduler", "constant", "--name", "straight"
    )
    assert_same_run(straight, extended)


@pytest.mark.parametrize(
    "changed", [[], ["--model.optimizer.lr", "5e-4", "--allow_changes", "true"]]
)
def test_resuming_a_finished_run_changes_nothing(
    command_line: CommandLine, fit_args: list[str], changed: list[str]
) -> None:
    run = command_line("fit", *fit_args).run()
    before = files_but_the_log(run)
    again = command_line(
        "fit", "--config", run.path / "config.yaml", "--ckpt_path", "last", *changed, root=False
    )
    assert again.code == 0, again.err
    assert "this run is finished" in again.out
    assert files_but_the_log(run) == before
    assert run.read()["status"] == "finished"


def files_but_the_log(run: RunFolder) -> dict[Path, bytes]:
    files = [p for p in run.path.rglob("*") if p.is_file() and p.name != "train.log"]
    return {file: file.read_bytes() for file in files}


def test_early_stopping_survives_a_kill_after_its_last_save(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    stopping = ["--early_stopping.patience", "1", "--early_stopping.min_delta", "100"]
    args = [*fit_args, *stopping, "--data.epochs", "9"]
    straight = command_line("fit", *args, "--name", "straight")
    stopped_at = straight.run("straight").read()["step"]
    run = command_line("fit", *args).run()
    run.update({"status": "running"})  # as if it had been killed before it could say so
    resumed = command_line(
        "fit", "--config", run.path / "config.yaml", "--ckpt_path", "last", root=False
    )
    assert resumed.code == 0, resumed.err
    assert run.read()["step"] == stopped_at
    assert run.read()["status"] == "finished"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "--model.optimizer.lr",
            "0.5",
            "model.optimizer.lr: the checkpoint was trained with 0.001",
        ),
        ("--data.batch_size", "4", "data.batch_size: the checkpoint was trained with 8"),
        (
            "--data.prompt",
            "Soal: {question}",
            "data.prompt: the checkpoint was trained with {question}",
        ),
    ],
)
def test_going_on_with_other_settings_is_refused(
    command_line: CommandLine, fit_args: list[str], flag: str, value: str, message: str
) -> None:
    run = command_line("fit", *fit_args, "--data.epochs", "1").run()
    before = {p.name: p.read_bytes() for p in run.path.iterdir() if p.suffix in (".json", ".csv")}
    more = ["--data.epochs", "2", "--ckpt_path", "last", flag, value]
    refused = command_line("fit", "--config", run.path / "config.yaml", *more, root=False)
    assert refused.code == 2
    assert message in refused.err
    assert {name: (run.path / name).read_bytes() for name in before} == before


def test_several_unfinished_runs_are_listed(command_line: CommandLine, fit_args: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            command_line("fit", *fit_args, "--checkpoint.every", "1", *stop_at(3))
    refused = command_line("fit", *fit_args, "--ckpt_path", "last")
    assert refused.code == 2
    assert "2 unfinished run(s)" in refused.err
    assert "version_0" in refused.err
    assert "version_1" in refused.err


def test_a_damaged_checkpoint_is_refused_by_name(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args).run()
    file = run.checkpoint("best") / "model.safetensors"  # type: ignore[operator]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused = command_line(
        "test", "--config", run.path / "config.yaml", "--ckpt_path", "best", root=False
    )
    assert refused.code == 2
    assert str(file) in refused.err


def assert_same_run(straight: Any, resumed: Any) -> None:
    """Hold two runs side by side: every logged number but speed and memory, and every weight."""
    rows = [
        [{k: v for k, v in row.items() if k[:5] != "perf/"} for row in outcome.metrics(name)]
        for outcome, name in ((straight, "straight"), (resumed, "run"))
    ]
    assert rows[0] == rows[1]
    weights = [
        load_file(next(outcome.run(name).checkpoint("last").glob("*model.safetensors")))
        for outcome, name in ((straight, "straight"), (resumed, "run"))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
