"""A rank that fails ends all others within a minute, and what went wrong first is said."""

from pathlib import Path

import pytest
from harness import fit_on_ranks

SPOIL = ["--trainer.callbacks+=spoil_rank.SpoilRank", "--trainer.callbacks.rank"]
LATEST = 120.0  # seconds: a minute to start on a busy machine, and one to end


@pytest.mark.timeout(200)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_out_of_memory_with_a_part_of_the_weights_is_a_clear_end(
    rank: int, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "1", *SPOIL, str(rank)]
    ended = fit_on_ranks(tmp_path, "fsdp2", 2, *args, seconds=LATEST)
    assert ended.returncode == (2 if rank == 0 else 1), ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    own = next(line for line in told if "ran out of memory" in line)
    assert f"rank {rank} ran out of memory in the step of step 3" in own
    assert "go on from the last checkpoint with data.max_tokens_per_micro_batch: " in own
    assert "Traceback" not in ended.stderr
    smaller = own.split("max_tokens_per_micro_batch: ")[1].split(",")[0]
    again = ["--ckpt_path", "last", "--data.max_tokens_per_micro_batch", smaller]
    went_on = fit_on_ranks(tmp_path, "fsdp2", 2, *fit_args, *again)
    assert went_on.returncode == 0, went_on.stderr


def test_fsdp2_on_one_device_cuts_nothing_and_takes_its_rows_again(
    fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, *SPOIL, "0", "--trainer.max_steps", "4"]
    done = fit_on_ranks(tmp_path, "fsdp2", 1, *args, seconds=LATEST)
    assert done.returncode == 0, done.stderr
    assert "out of memory in the step of step 3 (" in done.stdout


@pytest.mark.timeout(200)
def test_a_rank_out_of_memory_in_a_validation_names_the_step_that_was_taken(
    fit_args: list[str], tmp_path: Path
) -> None:
    spoil = [*SPOIL, "1", "--trainer.callbacks.how", "several", "--vram_guard.rehearse", "false"]
    args = [*fit_args, *spoil, "--trainer.max_steps", "2"]
    ended = fit_on_ranks(tmp_path, "fsdp2", 2, *args, seconds=LATEST)
    assert ended.returncode == 1, ended.stderr
    assert "rank 1 ran out of memory in the evaluation of step 2 (" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_a_killed_rank_ends_the_others_and_the_run_can_be_resumed(
    strategy: str, fit_args: list[str], tmp_path: Path
) -> None:
    kill = ["--trainer.callbacks+=kill_rank.KillRank"]
    args = [*fit_args, "--checkpoint.every", "1", *kill]
    ended = fit_on_ranks(tmp_path, strategy, 2, *args, seconds=LATEST)
    assert ended.returncode not in (0, 2), ended.stderr
    assert "another process of this run has ended" in ended.stderr
    assert "resume: python -m fine_tune fit --config" in ended.stderr
    assert "Traceback" not in ended.stderr
