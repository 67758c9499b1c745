"""Processes started from outside share one run folder and give the result of one process."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPOSITORY, CommandLine


def test_the_tasks_of_a_slurm_job_are_one_run(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    script = (REPOSITORY / "configs" / "slurm.sbatch").read_text()
    asked = dict(
        re.findall(
            r"--(nodes|ntasks-per-node|trainer\.num_nodes|trainer\.devices)[= ](\d+)", script
        )
    )
    assert asked["nodes"] == asked["trainer.num_nodes"]
    assert asked["ntasks-per-node"] == asked["trainer.devices"]
    single = command_line("fit", *fit_args, "--name", "single")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JOB_ID": "78", "JOB_NAME": "tune", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
    job |= {"NODELIST": "localhost", "NODEID": "0"}
    args = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    args += ["--trainer.num_nodes", "1", "--trainer.default_root_dir", str(tmp_path)]
    tasks = []
    for task in range(2):  # as srun starts them
        env = {
            f"SLURM_{k}": v for k, v in {**job, "PROCID": str(task), "LOCALID": str(task)}.items()
        }
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fine_tune", "fit", *fit_args, "--name", "together", *args]
        tasks.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **env},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert [p.name for p in (tmp_path / "lightning_logs" / "together").iterdir()] == ["version_0"]
    ours, theirs = (
        [float(row["train/loss"]) for row in single.metrics(name) if row["train/loss"]]
        for name in ("together", "single")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert single.run("together").read()["slurm_job"] == "78"


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
