"""Processes started from outside share one run folder and give the result of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPOSITORY, CommandLine


def test_torchrun_takes_one_folder_and_gives_the_same_losses(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    single = command_line("fit", *fit_args, "--name", "single")
    together = [
        "--name",
        "together",
        "--generations.rows",
        "2",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
        ]
        + ["-m", "fine_tune", "fit", *fit_args, *together, *two],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "lightning_logs" / "together").iterdir()] == ["version_0"]
    ours, theirs = (
        [float(row["train/loss"]) for row in single.metrics(name)]
        for name in ("single", "together")
    )
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert single.run("together").read()["status"] == "finished"
    assert done.stdout.count("next: python -m fine_tune") == 1
