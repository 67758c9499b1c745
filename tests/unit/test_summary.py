"""The commands a run prints can be pasted as they are, whatever its folder is called."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fine_tune import summary
from fine_tune.runs.run_folder import RunFolder

ROWS = {"train": 8, "test": 1}
MODELS = ("SFT", "DPO", "Reward", "Pretrain")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run in a folder whose name a shell would take apart."""
    return RunFolder(tmp_path / "my runs; it's $HOME" / "version_0")


def commands(lines: list[str]) -> list[list[str]]:
    """Paste every command of printed lines into a shell's reader."""
    found = [re.search(r"(python -m fine_tune|tensorboard) .*", line) for line in lines]
    return [shlex.split(match[0]) for match in found if match]


def ended(run: RunFolder, status: str, **identity: Any) -> list[list[str]]:
    run.update(
        {"status": status, "step": 2, "num_steps": 2, "identity": identity, "num_rows": ROWS}
    )
    return commands(summary.end_of_fit(run, 1.0, {}))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_commands_at_the_end_of_a_run_can_be_pasted(
    run: RunFolder, model: str, lora: bool
) -> None:
    identity = {"model": f"fine_tune.modules.{model}"} | ({"model.lora.r": 8} if lora else {})
    folder, config = str(run.path), str(run.path / "config.yaml")
    python = ["python", "-m", "fine_tune"]
    of_best = ["--config", config, "--ckpt_path", "best"]
    rows = ["--data.predict_path", "IN.jsonl", "--output", "OUT.jsonl"]
    assert ended(run, "finished", **identity) == [
        ["tensorboard", "--logdir", folder],
        [*python, "test", *of_best],
        *([] if model == "Reward" else [[*python, "chat", folder]]),
        [*python, "predict", *of_best, *rows],
        [*python, "merge" if lora else "export", folder],
    ]


def test_the_commands_after_a_stop_can_be_pasted(run: RunFolder) -> None:
    again = ["python", "-m", "fine_tune", "fit", "--config", str(run.path / "config.yaml")]
    assert ended(run, "stopped")[-1] == again
    (run.checkpoints / "last one").mkdir(parents=True)
    run.update({"last": "last one"})
    assert ended(run, "stopped")[-1] == [*again, "--ckpt_path", "last"]
    assert commands(summary.stopped(run, "fit", "SIGTERM"))[-1] == [*again, "--ckpt_path", "last"]
    run.update({"status": "finished"})
    validate = [*again[:3], "validate", *again[4:], "--ckpt_path", "best"]
    assert commands(summary.stopped(run, "fit", "SIGTERM")) == [validate]


def test_the_command_that_goes_on_names_no_flag() -> None:
    run = RunFolder(Path("-dash/lightning_logs/a b/version_0"))
    told = summary.resume(run)
    assert told.endswith("fit --config './-dash/lightning_logs/a b/version_0/config.yaml'")
