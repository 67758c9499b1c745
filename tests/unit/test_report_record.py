"""A run folder is read as far as it can be: missing, cut, and hostile files say less, never more."""

import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from fine_tune.report.record import read_run


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_an_empty_folder_is_empty(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert (run.status, run.step, run.num_steps, len(run.curve("train/loss"))) == ("empty", 0, 0, 0)
    assert run.missing == [
        "metrics.csv",
        "run.json",
        "config.yaml",
        "data.json",
    ]


def test_a_cut_row_loses_its_cut_values_only(tmp_path: Path) -> None:
    rows = "step,epoch,train/loss,lr\n10,0.1,2.5,1e-4\n20,0.2,x,1e-4\n30,0."
    run = read_run(write(tmp_path, metrics_csv=rows))
    assert run.curve("train/loss").steps.tolist() == [10]
    assert run.curve("epoch").steps.tolist() == [10, 20, 30]
    assert run.damaged == ["metrics.csv"]


def test_rows_of_one_step_are_one_and_values_that_are_no_numbers_stay_visible(
    tmp_path: Path,
) -> None:
    run = read_run(write(tmp_path, metrics_csv="step,train/loss,val/loss\n5,nan,\n5,,2.0\n"))
    assert len(run.metrics) == 1
    assert len(run.curve("train/loss")) == 1 and len(run.curve("train/loss").finite()) == 0
    assert run.curve("val/loss").values.tolist() == [2.0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"results": 5, "events": [1, {"step": "x"}], "seconds": "9"}']
)
def test_a_record_that_is_no_record_is_no_error(tmp_path: Path, text: str) -> None:
    run = read_run(write(tmp_path, run_json=text, config_yaml="- a\n", generations_jsonl="{\n[]\n"))
    assert run.results("test") == [] and "seconds" not in run.record
    assert run.config == {} and run.answers == []
    assert "config.yaml" in run.damaged


def test_settings_are_found_by_their_names_on_the_command_line(tmp_path: Path) -> None:
    config = "model: {class_path: x.SFT, init_args: {lora: {init_args: {r: 8}}}}\n"
    config += "data: {init_args: {batch_size: 4}}\n"
    run = read_run(write(tmp_path, config_yaml=config))
    assert (run.setting("model.lora.r"), run.setting("data.batch_size")) == (8, 4)
    assert run.setting("model.lora.none.of.it", "no") == "no"


def test_running_is_only_said_while_somebody_runs_it(tmp_path: Path) -> None:
    write(tmp_path, run_json='{"status": "running"}')
    assert read_run(tmp_path).status == "killed"
    owner = {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
    }
    (tmp_path / ".owner.json").write_text(json.dumps(owner))
    assert read_run(tmp_path).status == "running"
    (tmp_path / ".owner.json").write_text(json.dumps({**owner, "started": 0}))
    assert read_run(tmp_path).status == "killed"
