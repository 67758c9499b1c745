"""What happens to one rank of two never hangs the other, and changes nothing of the result."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import REPOSITORY, CommandLine, fit_on_ranks
from small_models import save_small_model

from fine_tune.runs.row_losses import read_row_losses
from fine_tune.runs.run_folder import RunFolder


def two_ranks(tmp_path: Path, *args: str) -> str:
    done = run_two_ranks(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_two_ranks(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return fit_on_ranks(tmp_path, "ddp", 2, *args)


@pytest.mark.parametrize("how", ["memory", pytest.param("sum", marks=pytest.mark.slow)])
def test_one_ranks_out_of_memory_makes_all_take_smaller_parts(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, how: str
) -> None:
    single = command_line("fit", *fit_args, "--name", "single")
    spoil = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", how]
    out = two_ranks(tmp_path, *fit_args, *spoil, "--name", "together")
    assert "out of memory in the step of step 3 (4 rows at once" in out
    ours, theirs = (
        [float(row["train/loss"]) for row in single.metrics(name) if row["train/loss"]]
        for name in ("together", "single")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    (event,) = single.run("together").read()["events"]
    assert event["step"] == 3
    rows = [read_row_losses(single.run(name)) for name in ("together", "single")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)  # of each validation row: id, count, loss


def test_one_rank_without_room_for_its_optimizer_stops_both_before_step_1(
    fit_args: list[str], tmp_path: Path
) -> None:
    spoil = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", "update"]
    done = run_two_ranks(tmp_path, *fit_args, *spoil)
    assert done.returncode == 2, done.stderr
    assert "model.optimizer: the state of AdamW for" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_ranks_nan_lowers_the_precision_of_all(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    spoil = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", "nan"]
    out = two_ranks(tmp_path, *fit_args, *spoil, "--trainer.precision", "bf16-mixed")
    assert "the same rows are taken again in 32-true" in out
    outcome = command_line("analyze", *fit_args, "--trainer.default_root_dir", str(tmp_path))
    (event,) = outcome.run().read()["events"]
    assert len(event["row_ids"]) == 8  # of both ranks
    assert len([row for row in outcome.metrics() if row["train/loss"]]) == 10


def test_a_rank_that_comes_late_to_the_rehearsal_hangs_nobody(
    fit_args: list[str], tmp_path: Path
) -> None:
    late = ["--trainer.callbacks+=slow_rank.SlowRank", "--trainer.callbacks.seconds", "3"]
    out = two_ranks(tmp_path, *fit_args, *late, "--trainer.max_steps", "1")
    assert "finished: step 1 of 1" in out


def test_a_rank_without_validation_rows_hangs_no_mixture_of_experts(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    save_small_model(tmp_path / "moe", "qwen3_moe", head_dim=8, norm_topk_prob=False, **experts)
    one = ["--data.max_rows", '{"validation": 1}', "--trainer.max_steps", "2"]
    model = ["--model.model_name_or_path", str(tmp_path / "moe")]
    two_ranks(tmp_path, *fit_args, *model, *one)
    outcome = command_line("analyze", *fit_args, "--trainer.default_root_dir", str(tmp_path))
    last = outcome.metrics()[-1]
    assert float(last["val_experts/load_00"]) >= 1
    assert float(last["train_experts/load_00"]) >= 1


@pytest.mark.slow
def test_ranks_that_others_started_go_back_in_the_run_of_the_first(
    fit_args: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "lightning_logs" / "run" / "version_0"  # of the same name, and unfinished
    (other / "checkpoints" / "epoch=1.00-step=4").mkdir(parents=True)
    (other / "run.json").write_text('{"status": "failed", "last": "epoch=1.00-step=4"}')
    ruin = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", "weights"]
    args = [*fit_args, *ruin, "--trainer.precision", "bf16-mixed", "--checkpoint.every", "2"]
    args += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--vram_guard.rehearse", "false"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "fine_tune", "fit", *args],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going back to epoch=0.40-step=2" in done.stdout
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_1")
    assert run.read()["status"] == "finished"


def test_one_ranks_validation_in_smaller_parts_is_told_and_kept(
    fit_args: list[str], tmp_path: Path
) -> None:
    spoil = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", "several"]
    args = [*fit_args, *spoil, "--vram_guard.rehearse", "false", "--trainer.max_steps", "2"]
    out = two_ranks(tmp_path, *args)
    told = "rank 1: out of memory in the evaluation of step 2 (2 rows at once, longest"
    assert told in out
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_0")
    events = run.read()["events"]
    assert {(event["step"], event["kind"]) for event in events} == {(2, "out_of_memory")}
    cut = events[-1]["event"].split(" -> ")[1]
    last = ["--ckpt_path", str(run.checkpoint("last"))]
    longer = two_ranks(tmp_path, *args, "--trainer.max_steps", "3", *last)
    assert f"micro-batches: {cut.split(' ')[0]} tokens, cut earlier in this run" in longer


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_validation_row_that_does_not_fit_one_rank_ends_both_saved(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, rank: str
) -> None:
    refuse = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.how", "validation"]
    refuse += ["--trainer.callbacks.rank", rank, "--vram_guard.rehearse", "false"]
    refuse += ["--trainer.callbacks+=slow_report.SlowReport"]
    started = time.monotonic()
    done = run_two_ranks(tmp_path, *fit_args, *refuse, "--trainer.max_steps", "2")
    assert time.monotonic() - started < 75  # of which most is the start
    assert done.returncode == 2, done.stderr  # not killed by its launcher before it was done
    assert "out of memory in the evaluation of step 2 with a row of 9 tokens" in done.stderr
    assert "Traceback" not in done.stderr
    run = RunFolder(tmp_path / "lightning_logs" / "run" / "version_0")
    record = run.read()
    assert (record["last"], record["status"]) == ("epoch=0.40-step=2", "failed")
    out = two_ranks(tmp_path, *fit_args, "--trainer.max_steps", "2", "--ckpt_path", "last")
    assert "finished: step 2 of 2" in out
    outcome = command_line("analyze", *fit_args, "--trainer.default_root_dir", str(tmp_path))
    measured = [row for row in outcome.metrics() if row["val/loss"]]
    assert [row["step"] for row in measured] == ["2"]  # what was due is done, once
    assert len([row for row in outcome.metrics() if row["train/loss"]]) == 2
