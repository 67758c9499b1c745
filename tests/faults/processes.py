"""What the fault tests share: runs in processes of their own, and two runs held side by side."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from harness import CommandLine, Outcome
from safetensors.torch import load_file

from fine_tune.runs.run_folder import RunFolder

SLOW = ["--trainer.callbacks+=signal_at.Slow"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]


def start(args: list[str], tmp_path: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fine_tune", "fit", *args]
        + ["--trainer.default_root_dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: RunFolder, step: int) -> None:
    end = time.monotonic() + 120
    file = run.path / "metrics.csv"
    while not file.exists() or len(file.read_text().splitlines()) <= step:
        assert time.monotonic() < end, "the run did not come that far"
        time.sleep(0.02)


def rank_pid(first: int, rank: int) -> int:
    """Find a process of the run; those the first one started have the same command line."""
    started = [p.pid for p in psutil.Process(first).children() if "fit" in p.cmdline()]
    return [first, *started][rank]


def resume(command_line: CommandLine, run: RunFolder, *more: str) -> Outcome:
    args = ["--trainer.callbacks", "null", "--ckpt_path", "last", *more]
    resumed = command_line("fit", "--config", run.path / "config.yaml", *args, root=False)
    assert resumed.code == 0, resumed.err
    return resumed


def assert_same_run(straight: Outcome, resumed: Outcome) -> None:
    """Every logged number but speed and memory, the record of the checkpoints, and every weight."""
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith("perf/")}
            for row in outcome.metrics(name)
        ]
        for outcome, name in ((straight, "straight"), (resumed, "run"))
    ]
    assert rows[0] == rows[1]
    runs = [straight.run("straight"), resumed.run("run")]
    records = [run.read() for run in runs]
    for key in ("status", "step", "best", "best_score", "last"):
        assert records[0][key] == records[1][key], key
    weights = [load_file(next(run.checkpoint("last").glob("*model.safetensors"))) for run in runs]  # type: ignore[union-attr]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
