"""``predict`` killed at any time keeps the rows it has answered, and the same command goes on to the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine, write_rows

from fine_tune.output_file import OutputFile, _write_lines

NUM_ROWS = 60


def start(args: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fine_tune", "predict", *args],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(file: Path, count: int) -> None:
    end = time.monotonic() + 120
    while not file.exists() or len(file.read_text("utf-8").splitlines()) < count:
        assert time.monotonic() < end, "it did not come that far"
        time.sleep(0.005)


def test_killed_and_stopped_it_goes_on_to_the_same_file(
    command_line: CommandLine,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"text": f"Berapa {i} + {i % 7}?" + " Jawab." * (i % 9)} for i in range(NUM_ROWS)]
    file = write_rows(tmp_path / "in.jsonl", rows)
    straight, output = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    unfinished = tmp_path / "out.jsonl.unfinished"
    args = [
        *("--model.model_name_or_path", str(model_folder), "--data.predict_path", str(file)),
        *("--sampling.temperature", "1", "--sampling.max_new_tokens", "16"),
    ]
    slow = ["--data.max_tokens_per_micro_batch", "4"]  # a row at a time; changes no answer
    process = start([*args, *slow, "--output", str(output)])
    wait_for_rows(unfinished, 10)
    process.send_signal(signal.SIGSTOP)
    second = command_line("predict", *args, "--output", output)
    assert second.code == 2 and "another process is writing" in second.err
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    killed_at = len(unfinished.read_text("utf-8").splitlines())
    keep = OutputFile.keep

    def keep_and_stop(self: OutputFile, row: int, result: dict[str, Any]) -> None:
        keep(self, row, result)
        if len(self.results) == killed_at + 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "keep", keep_and_stop)
        stopped = command_line("predict", *args, *slow, "--output", output)
    assert stopped.code == 143
    assert f"{killed_at} of {NUM_ROWS} rows are done already: going on" in stopped.out
    assert "rows are kept; the same command goes on from there" in stopped.out
    resumed = command_line("predict", *args, "--output", output)
    assert resumed.code == 0, resumed.err
    assert f"{killed_at + 10} of {NUM_ROWS} rows are done already" in resumed.out
    assert command_line("predict", *args, "--output", straight).code == 0
    assert output.read_text("utf-8") == straight.read_text("utf-8")
    assert len(output.read_text("utf-8").splitlines()) == NUM_ROWS
    assert not unfinished.exists()


def test_a_full_disk_keeps_what_was_answered_and_says_how_to_go_on(
    command_line: CommandLine,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_rows(tmp_path / "in.jsonl", [{"text": f"Berapa {i}?"} for i in range(10)])
    output = tmp_path / "out.jsonl"
    args = ["--model.model_name_or_path", model_folder, "--data.predict_path", file]
    args += ["--output", output, "--sampling.max_new_tokens", "4"]

    def no_room(path: Path, lines: Iterable[str]) -> None:
        if "record" not in path.name:
            raise OSError(28, "No space left on device")
        _write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr("fine_tune.output_file._write_lines", no_room)
        outcome = command_line("predict", *args)
    assert outcome.code == 2 and "No space left on device" in outcome.err
    assert "the same command goes on" in outcome.err and not output.exists()
    assert command_line("predict", *args).code == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        f"Berapa {i}?" for i in range(10)
    ]
