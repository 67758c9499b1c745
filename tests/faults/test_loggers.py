"""metrics.csv is whole at any instant; a logger that fails never stops a run."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine

from fine_tune.callbacks.generations import Generations
from fine_tune.loggers import MetricsCSV, QuietWandb


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 2.0}, step=1)
    assert rows(tmp_path)[-1].startswith("1,,2")


def test_values_of_one_step_share_its_row_and_new_columns_keep_old_rows(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 2.0}, step=1)
    logger.log_metrics({"train/loss": 1.0}, step=2)
    logger.log_metrics({"val/new": 3.0}, step=2)
    logger.log_metrics({"val/loss": 4.0}, step=2)
    header, first, second = rows(tmp_path)
    assert dict(zip(header.split(","), second.split(","), strict=True)) == {
        **dict.fromkeys(header.split(","), ""),
        "step": "2",
        "train/loss": "1",
        "val/loss": "4",
        "val/new": "3",
    }
    assert first.startswith("1,,2")


def test_reopening_keeps_the_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(1, 6):
        logger.log_metrics({"train/loss": step}, step=step)
    again = MetricsCSV(tmp_path, keep_until=3)
    assert [row.split(",")[0] for row in rows(tmp_path)] == ["step", "1", "2", "3"]
    again.log_metrics({"train/loss": 9}, step=4)
    assert rows(tmp_path)[-1].startswith("4,,9")
    assert [row.split(",")[0] for row in rows(tmp_path)] == ["step", "1", "2", "3", "4"]


def test_a_validation_after_reopening_joins_the_row_of_its_step(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(1, 4):
        logger.log_metrics({"train/loss": step}, step=step)
    again = MetricsCSV(tmp_path, keep_until=2)
    again.log_metrics({"val/loss": 5}, step=2)
    assert rows(tmp_path)[1:] == ["1,,1,,,,", "2,,2,,,,5"]
    again.log_metrics({"train/loss": 6}, step=3)
    assert rows(tmp_path)[1:] == ["1,,1,,,,", "2,,2,,,,5", "3,,6,,,,"]


@pytest.mark.parametrize("left", [b"1", b"3,,7", bytes(40)], ids=["number", "row", "zeros"])
def test_half_a_row_that_a_power_failure_left_is_no_row(tmp_path: Path, left: bytes) -> None:
    """The 1 is what was written of step 12."""
    logger = MetricsCSV(tmp_path)
    for step in range(1, 3):
        logger.log_metrics({"train/loss": step}, step=step)
    with open(logger.file, "ab") as handle:
        handle.write(left)
    MetricsCSV(tmp_path, keep_until=9).log_metrics({"train/loss": 5}, step=10)
    assert rows(tmp_path)[1:] == ["1,,1,,,,", "2,,2,,,,", "10,,5,,,,"]


def test_a_failing_wandb_is_one_line_and_the_run_goes_on(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("W&B is off for this run") == 1
    assert outcome.run().read()["status"] == "finished"
    everything = [p.read_bytes() for p in outcome.run().path.rglob("*") if p.is_file()]
    assert not any(b"0" * 40 in content for content in everything)


def test_wandb_offline_records_the_run(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 2)
    assert outcome.code == 0, outcome.err
    assert list((outcome.run().path / "wandb").glob("offline-run-*"))
    assert "W&B" not in outcome.out
    assert wandb.run is None  # finished


def test_a_server_of_wandb_that_is_down_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    wandb.teardown()  # it keeps the environment it first saw
    monkeypatch.setattr("fine_tune.loggers.START_SECONDS", 1)
    for key, value in {
        "MODE": "online",
        "BASE_URL": "http://127.0.0.1:9",
        "API_KEY": "0" * 40,
    }.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    caplog.set_level("INFO", logger="fine_tune")
    logger = QuietWandb(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    wandb.teardown()
    (told,) = (r.getMessage() for r in caplog.records if r.name == "fine_tune")
    assert "W&B is not reached" in told and str(tmp_path / "wandb") in told
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"trainer/global_step" in kept.read_bytes()


def test_a_wandb_that_does_not_end_is_waited_for_once_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    class Slow:
        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)
            time.sleep(20)

    monkeypatch.setattr("fine_tune.loggers.FINISH_SECONDS", 0.2, raising=False)
    caplog.set_level("INFO", logger="fine_tune")
    logger, begin = QuietWandb(tmp_path), time.monotonic()
    logger._run = Slow()
    logger.finalize("success")
    logger.finalize("success")  # after a fit's last validation
    assert time.monotonic() - begin < 10
    assert calls == [0]
    (told,) = caplog.messages
    assert "W&B" in told and str(tmp_path / "wandb") in told


def test_a_wandb_that_fails_later_is_switched_off(tmp_path: Path) -> None:
    class Failing:
        def log(self, *args: Any) -> None:
            raise OSError("disk full")

    logger = QuietWandb(tmp_path)
    logger._run = Failing()
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 1.0}, step=2)
    assert logger._off


def test_answers_that_cannot_be_kept_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO", logger="fine_tune")
    answers = Generations()
    for _ in range(2):
        answers._keep(tmp_path / "file" / "generations.jsonl", ["{}\n"])
    (told,) = caplog.messages
    assert "File exists" in told and "training goes on" in told


def test_a_reader_that_goes_away_stops_nothing_and_is_no_error() -> None:
    program = (
        "import logging; from fine_tune.quiet import start_console; start_console()\n"
        "for i in range(9999): logging.getLogger('fine_tune').info('a line')\n"
        "open('/dev/stderr', 'w').write('went on')"
    )
    piped = f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "a line\n0\n" and ended.stderr == "went on"
