"""A run folder is read as far as it can be: missing, cut, and hostile files say less, never more."""

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from fine_tune.report.record import read_run
from fine_tune.report.write import write_comparison, write_report


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


@pytest.mark.parametrize("row", ["1e30,2.0", "1e400,2.0", f"2,{'9' * 200_000}", "2,1e308"])
def test_numbers_that_no_run_has_are_left_out_and_told(tmp_path: Path, row: str) -> None:
    write(tmp_path, metrics_csv=f"step,train/loss\n1,-1e30\n{row}\n", run_json="{}")
    run = read_run(tmp_path)
    assert run.damaged == ["metrics.csv"]
    assert run.curve("train/loss").values.tolist() in ([-1e30], [])
    assert write_report(tmp_path).read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"results": 5, "events": [1, {"step": "x"}], "seconds": "9"}']
)
def test_a_record_that_is_no_record_is_no_error(tmp_path: Path, text: str) -> None:
    run = read_run(write(tmp_path, run_json=text, config_yaml="- a\n", generations_jsonl="{\n[]\n"))
    assert run.results("test") == [] and "seconds" not in run.record
    assert run.config == {} and run.answers == []
    assert "config.yaml" in run.damaged


def test_a_run_is_named_by_its_folders_from_within_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine" / "version_3"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert read_run(Path()).name == read_run(folder).name == "mine/version_3"


def test_settings_are_found_by_their_names_on_the_command_line(tmp_path: Path) -> None:
    config = "model: {class_path: x.SFT, init_args: {lora: {init_args: {r: 8}}}}\n"
    config += "data: {init_args: {batch_size: 4}}\n"
    run = read_run(write(tmp_path, config_yaml=config))
    assert (run.setting("model.lora.r"), run.setting("data.batch_size")) == (8, 4)
    assert run.setting("model.lora.none.of.it", "no") == "no"


@pytest.mark.parametrize("last", ["c", "../../c", "c\0", None, 5, "x" * 300])
def test_the_adapter_is_read_from_the_runs_own_last_checkpoint(tmp_path: Path, last: Any) -> None:
    for place in (tmp_path / "run" / "checkpoints" / "c", tmp_path / "c"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text(json.dumps({"r": 8, "whose": str(place)}))
    run = read_run(write(tmp_path / "run", run_json=json.dumps({"last": last})))
    own = str(tmp_path / "run" / "checkpoints" / "c")
    assert run.adapter == ({"r": 8, "whose": own} if last in ("c", "../../c") else {})
    assert "adapter_config.json" not in " ".join(run.missing)


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
    write(tmp_path, run_json="{}")  # it has not begun to train
    assert read_run(tmp_path).status == "running"
    write(tmp_path, run_json='{"status": "running"}')
    (tmp_path / ".owner.json").write_text(json.dumps({**owner, "started": 0}))
    assert read_run(tmp_path).status == "killed"


JUNK = (None, -1, 2.5, float("nan"), "x", "", [], {}, [1, "a"], {"a": 1}, True, 10**30)


def spoiled(value: Any, draw: random.Random) -> Any:
    """Replace one value, somewhere in a nest of them."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        return {**value, key: spoiled(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], spoiled(value[at], draw), *value[at + 1 :]]
    return draw.choice(JUNK)


@pytest.mark.parametrize("seed", range(20))
def test_files_with_wrong_values_in_them_still_give_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for place in ("curves", "compare"):
        monkeypatch.setattr(f"fine_tune.report.{place}.draw", lambda _: "<svg></svg>")
    draw = random.Random(seed)
    for name, value in FILES.items():
        for _ in range(draw.randint(0, 12)):
            value = spoiled(value, draw)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,val/loss,lr\n1,2.0,,1e-3\n2,1.0,1.5,1e-3\n"
    )
    (tmp_path / "generations.jsonl").write_text(json.dumps(spoiled(ANSWER, draw)) + "\n")
    page = write_report(tmp_path)
    assert page.read_text().rstrip().endswith("</html>")
    assert write_comparison([tmp_path, tmp_path]).read_text().rstrip().endswith("</html>")


ANSWER = {
    "stage": "after x",
    "row_id": 3,
    "prompt": "p",
    "expected": "e",
    "answer": "a",
    "log_odds": 1.5,
}
LENGTHS = {"mean": 5.0, "median": 5.0, "p95": 9.0, "max": 9}
FILES: dict[str, Any] = {
    "run.json": {
        "status": "finished",
        "step": 2,
        "num_steps": 2,
        "steps_per_epoch": 2,
        "seconds": 3.5,
        "num_rows": {"train": 5, "test": 2},
        "num_tokens": {"train": 50},
        "model": {"parameters": 100, "trained": 10},
        "environment": {
            "python": "3",
            "packages": {"torch": "2"},
            "devices": ["x"],
            "num_devices": 1,
        },
        "starts": [{"from_step": 0}, {"from_step": 1}],
        "commands": [{"command": ["fit", "--x"], "directory": "."}],
        "events": [{"step": 1, "kind": "fallback", "to": "32-true"}, {"step": 2, "kind": "y"}],
        "changes": [{"step": 1, "key": "k", "from": 1, "to": 2}],
        "parents": [{"gave": "weights", "run": "r", "checkpoint": "c"}],
        "results": [
            {
                "split": split,
                "time": "2026-01-01T00:00:00",
                "checkpoint": "c",
                "metrics": {f"{short}/loss": 1.0, f"{short}/exact_match": 0.5},
                "intervals": {f"{short}/loss": [0.5, 1.5]},
            }
            for split, short in (("validation", "val"), ("test", "test"))
        ],
        "test_openings": [{"id": 1}],
        "energy": {"watt_hours": 1.5},
        "best": "c",
        "best_step": 2,
        "best_score": 1.0,
        "monitor": "val/loss",
        "last": "c",
    },
    "data.json": {
        "rows": {"train": 5},
        "splits": {"train": {"length": LENGTHS, "supervised_length": LENGTHS}},
        "length": {**LENGTHS, "histogram": {"edges": [1, 5, 10], "counts": [2, 3]}},
        "repeated_rows": {"repeated": 0, "near": 1},
        "leakage": {"between": {"train/test": {"test": {"exact": 0, "near": 1}}}},
        "supervised_tokens": 20,
        "tokens": 50,
        "truncated_rows_share": 0.1,
        "supervised_tokens_lost_share": 0.0,
        "too_long_rows": 0,
        "empty_completions": 0,
        "preferences": {},
    },
    "config.yaml": {
        "purpose": "p",
        "targets": {"val/loss": 1.0},
        "licences": {"all": "MIT"},
        "seed_everything": 1,
        "grid_gco2e_per_kwh": 400.0,
        "trainer": {
            "precision": "32-true",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
        },
        "model": {
            "class_path": "x.SFT",
            "init_args": {
                "model_name_or_path": "m",
                "lora": {"init_args": {"r": 8, "target_modules": ["q"]}},
                "optimizer": {
                    "class_path": "o.AdamW",
                    "init_args": {"lr": 1e-3, "weight_decay": 0.1},
                },
                "warmup_ratio": 0.1,
            },
        },
        "data": {"init_args": {"path": {"train": "t"}, "batch_size": 8, "epochs": 1}},
    },
    "checkpoints/c/adapter_config.json": {"r": 8, "target_modules": ["q"]},
}
