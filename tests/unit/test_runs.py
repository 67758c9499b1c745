"""``runs`` says what became of each run, from what lies in its folder."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fine_tune.commands.runs import main
from fine_tune.errors import UserError
from fine_tune.runs.identity import MANIFEST
from fine_tune.runs.places import find_place
from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.run_lock import LOCK, RunLock, is_owned

ESC = "\x1b"


def write_run(root: Path, name: str, version: int = 0, **record: Any) -> Path:
    run = root / "lightning_logs" / name / f"version_{version}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    config = {
        "model": {
            "class_path": "fine_tune.modules.SFT",
            "init_args": {"model_name_or_path": "microsoft/phi-2", "quantization": "nf4", "lora": {"r": 8}},
        },
        "data": {"init_args": {"path": "folder/rows.jsonl"}},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def own(run: Path, pid: int) -> None:
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 0.0
    owner = {"pid": pid, "started": started, "host": socket.gethostname()}
    (run / ".owner.json").write_text(json.dumps(owner))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished, a killed, a running, an empty and a stopped run."""
    opening = {"id": "a", "test_hash": "x"}
    result = {"split": "test", "metrics": {"test/loss": 1.5, "val/loss": 9.0}}
    write_run(
        tmp_path, "done", status="finished", step=625, num_steps=625, monitor="val/loss", best_score=1.25,
        seconds=3600.0, starts=[{"time": "2026-01-01T10:00:00.000+00:00"}], results=[result],
        test_openings=[opening, {**opening, "id": "b"}], identity={"data.seed": 1, "same": 2},
    )  # fmt: skip
    start = {"starts": [{"time": "2026-01-02T10:00:00.000+00:00"}], "num_steps": 10}
    killed = write_run(
        tmp_path, "killed", status="running", last_saved="2026-01-02T10:30:00+00:00", last="epoch=1.00-step=4",
        checkpoints=[{"name": "epoch=1.00-step=4", "step": 4}], identity={"data.seed": 3, "same": 2},
        test_openings=[{"id": "c", "test_hash": "x"}], monitor="val/loss", best_score=0.5, **start,
    )  # fmt: skip
    (killed / "checkpoints" / "epoch=1.00-step=4").mkdir()
    own(killed, 2**22 + 1)  # a process that is gone
    own(write_run(tmp_path, "going", status="running", **start), os.getpid())
    write_run(tmp_path, "empty")
    write_run(tmp_path, "evil", version=3, status=f"stopped{ESC}[31m", monitor="<script>")
    return tmp_path


def listed(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    assert main(["runs", "--json", "--root", str(root), *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_run_has_its_true_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {run["run"]: run for run in listed(root, capsys)}
    assert {name: run["status"] for name, run in found.items() if "evil" not in name} == {
        "done/version_0": "finished",
        "killed/version_0": "killed",
        "going/version_0": "running",
        "empty/version_0": "empty",
    }
    killed = found["killed/version_0"]
    assert killed["resumable"] and not found["going/version_0"]["resumable"]
    assert killed["step"] == 4 and killed["seconds"] == 1800
    done = found["done/version_0"]
    assert done["model"] == "SFT microsoft/phi-2 nf4 LoRA" and done["data"] == "folder/rows.jsonl"
    assert done["test"] == {"test/loss": 1.5} and done["best"] == 1.25


def test_openings_of_a_test_split_are_counted_over_all_runs(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {run["run"]: run["test_openings"] for run in listed(root, capsys)}
    assert found["done/version_0"] == found["killed/version_0"] == 3
    assert found["empty/version_0"] == 0


def test_openings_outside_the_listed_runs_are_counted_from_the_list_beside_the_split(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "lightning_logs" / "done" / "version_0"
    record = {**RunFolder(run).read(), "commands": [{"directory": str(root)}]}
    (run / "run.json").write_text(json.dumps(record))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["cache_dir"] = "cache"  # from where the command was typed
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    beside = root / "cache" / "test_splits" / "x" / "openings.jsonl"
    beside.parent.mkdir(parents=True)
    noted = [{"id": i, "test_hash": "x"} for i in ("a", "of a deleted run", "of a deleted run")]
    beside.write_text("".join(json.dumps(opening) + "\n" for opening in noted))
    found = {run["run"]: run["test_openings"] for run in listed(root, capsys)}
    assert found["done/version_0"] == found["killed/version_0"] == 4
    beside.write_text('{"id": ')
    assert main(["runs", "--json", "--root", str(root)]) == 0
    said = capsys.readouterr()
    found = {run["run"]: run["test_openings"] for run in json.loads(said.out)}
    assert found["done/version_0"] == 3
    assert f"{beside}: its openings are not counted" in said.err


def test_runs_are_filtered_and_sorted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [run["run"] for run in listed(root, capsys, "--filter", "status=k*")] == [
        "killed/version_0"
    ]
    measured = ["killed/version_0", "done/version_0"]  # the others have none, and come last
    for key, expected in (("val/loss", measured), ("-val/loss", measured[::-1])):
        by_best = listed(root, capsys, f"--sort={key}")
        assert [run["run"] for run in by_best][:2] == expected
    newest = [run["run"] for run in listed(root, capsys)]
    assert newest.index("done/version_0") > newest.index("killed/version_0")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resumable", ["killed/version_0"]),
        ("killed, resumable", ["killed/version_0"]),
        ("killed", ["killed/version_0"]),
        ("finished", ["done/version_0"]),
    ],
)
def test_a_status_is_found_as_the_table_shows_it(
    root: Path, capsys: pytest.CaptureFixture[str], pattern: str, names: list[str]
) -> None:
    assert [run["run"] for run in listed(root, capsys, "--filter", f"status={pattern}")] == names


def test_every_column_shown_can_be_sorted_by(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"split": "test", "metrics": {"test/loss": 0.5}}
    write_run(root, "other", status="finished", step=3, seconds=9.0, results=[other])

    def order(column: str) -> list[str]:
        found = [run["run"].split("/")[0] for run in listed(root, capsys, f"--sort={column}")]
        return [name for name in found if name in ("done", "other")]

    assert order("time") == order("test") == order("step") == order("opened") == ["other", "done"]
    assert order("-time") == order("-test") == order("-step") == ["done", "other"]
    assert order("-opened") == order("best") == ["done", "other"]  # 3 openings; only one has a best
    assert main(["runs", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for column in next(line for line in lines if "opened" in line).split():
        listed(root, capsys, f"--sort={column}")


@pytest.mark.parametrize("column", ["time", "opened", "test", "best", "step"])
def test_a_column_that_is_empty_for_every_run_sorts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str
) -> None:
    write_run(tmp_path, "empty")
    assert len(listed(tmp_path, capsys, f"--sort={column}")) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--filter", "stat=x"], "did you mean 'status'"),
        (["--filter", "status"], "'status' is not KEY=PATTERN; give one, like status=*text*"),
        (["--filter", "status="], "the pattern of 'status=' is empty; give one, like status="),
        (["--sort", "vall/loss"], "no run has 'vall/loss'; did you mean 'val/loss'"),
        (["--compare", "done", "nope"], "no run 'nope'"),
        (["--compare", "done"], "give two runs or more, got 'done/version_0' alone"),
        (["--compare", "done", "a question typed in its place, " * 20], "no run 'a question"),
    ],
)
def test_mistakes_are_told(
    root: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    assert main(["runs", "--root", str(root), *flags]) == 2
    assert told in capsys.readouterr().err


def test_only_what_differs_is_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(root), "--json", "--compare", "done", "killed"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["different"]["data.seed"] == [1, 3]
    assert "same" not in told["different"]


def test_a_test_of_other_rows_is_not_compared_as_the_runs_own(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_rows = {"split": "test", "test_hash": "x", "metrics": {"test/loss": 1.5}}
    others = {"split": "test", "test_hash": "y", "metrics": {"test/loss": 9.5, "test/more": 1.0}}
    write_run(root, "one", test_hash="x", results=[own_rows, others])
    write_run(root, "two", test_hash="x", results=[{**own_rows, "metrics": {"test/loss": 2.5}}])
    assert main(["runs", "--root", str(root), "--json", "--compare", "one", "two"]) == 0
    different = json.loads(capsys.readouterr().out)["different"]
    assert different == {"test/loss": [1.5, 2.5]}


def no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_what_is_no_number_is_null_in_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"val/loss": float("nan"), "val/perplexity": float("inf")}
    identity = {"rates": [0.1, -float("inf")]}
    results = [{"split": "validation", "metrics": metrics}]
    write_run(root, "diverged", results=results, identity=identity, monitor=float("nan"))
    for flags in (["--compare", "done", "diverged"], []):
        assert main(["runs", "--root", str(root), "--json", *flags]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=no_json)
        if flags:
            assert told["different"]["val/loss"] == [9.0, None]
            assert told["different"]["rates"] == [None, [0.1, None]]
    assert main(["runs", "--root", str(root), "--compare", "done", "diverged"]) == 0
    assert "nan" in capsys.readouterr().out  # a reader sees what it was


def test_a_damaged_record_is_told_and_hides_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "lightning_logs" / "empty" / "version_0" / "run.json").write_text("{")
    assert main(["runs", "--root", str(root)]) == 0
    said = capsys.readouterr()
    assert "record is damaged" in said.err and "done/version_0" in said.out


MALFORMED: list[Any] = [
    [1, 2], None, 3, {"results": [{}]}, {"results": [{"split": "test", "metrics": None}]}, {"best_score": "x"},
    {"step": "5x"}, {"starts": "abc"}, {"seconds": float("nan")}, {"seconds": 1e300}, {"test_openings": None},
    {"checkpoints": [{}], "last": "a"}, {"last": 5}, {"status": "running", "starts": [{"time": "x"}]},
]  # fmt: skip


@pytest.mark.parametrize("record", MALFORMED, ids=[json.dumps(record)[:40] for record in MALFORMED])
def test_a_malformed_record_stops_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    file = root / "lightning_logs" / "empty" / "version_0" / "run.json"
    file.write_text(json.dumps(record))
    (file.parent / "config.yaml").write_bytes(b"\xff model: x")
    (file.parent / ".owner.json").write_text("[1]")
    assert main(["runs", "--root", str(root)]) == 0
    assert "done/version_0" in capsys.readouterr().out
    assert main(["runs", "--root", str(root), "--json"]) == 0
    assert "NaN" not in capsys.readouterr().out


@pytest.mark.parametrize("record", [{"results": [{}]}, {"results": None}, {"identity": [1]}])
def test_a_malformed_record_is_not_compared(
    root: Path, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    file = root / "lightning_logs" / "empty" / "version_0" / "run.json"
    file.write_text(json.dumps(record))
    assert main(["runs", "--root", str(root), "--compare", "done", "empty"]) == 2
    assert f"{file}: the run's record is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "commands", [None, [], "x", [None], [{}], [{"directory": None}], [{"directory": "/gone"}]]
)
def test_where_a_command_was_typed_is_here_if_nobody_knows(tmp_path: Path, commands: Any) -> None:
    run = RunFolder(write_run(tmp_path, "a", commands=commands))
    assert run.directory == Path()
    run.update({"commands": [{"directory": "/gone"}, {"directory": str(tmp_path)}]})
    assert run.directory == tmp_path


def test_names_do_nothing_to_the_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(root)]) == 0
    assert ESC not in capsys.readouterr().out


def test_no_runs_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(tmp_path)]) == 0
    assert "no runs under" in capsys.readouterr().out


def left_by_another_machine(folder: Path, *, minutes: float) -> dict[str, bytes]:
    """Leave what a run wrote there, so long ago; return its files."""
    (folder / ".owner.json").write_text(json.dumps({"pid": 1, "started": 0.0, "host": "colab-1"}))
    for name in ("metrics.csv", "train.log", LOCK):
        (folder / name).touch()
    for file in folder.iterdir():
        os.utime(file, (time.time() - 60 * minutes,) * 2)
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_killed_on_another_machine_is_known_as_killed_when_it_was_quiet(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "lightning_logs" / "killed" / "version_0"
    before = left_by_another_machine(folder, minutes=16)
    found = {run["run"]: run for run in listed(root, capsys)}["killed/version_0"]
    assert found["status"] == "killed" and found["resumable"]
    assert {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", [".owner.json", "run.json", "metrics.csv", "train.log"])
def test_a_run_on_another_machine_that_wrote_of_late_is_running(root: Path, name: str) -> None:
    folder = root / "lightning_logs" / "killed" / "version_0"
    left_by_another_machine(folder, minutes=16)
    assert not is_owned(folder)
    os.utime(folder / name, (time.time() - 60 * 14,) * 2)
    assert is_owned(folder)


def test_a_run_on_another_machine_whose_lock_is_held_is_running_however_quiet(root: Path) -> None:
    folder = root / "lightning_logs" / "killed" / "version_0"
    own(folder, 2**22 + 1)
    lock = RunLock(folder, "fit")
    left_by_another_machine(folder, minutes=600)
    assert is_owned(folder)
    lock.release()
    left_by_another_machine(folder, minutes=600)
    assert not is_owned(folder)
    (folder / LOCK).unlink()
    assert not is_owned(folder)


def test_a_checkpoint_that_is_not_there_is_told_beside_checkpoints_alone(tmp_path: Path) -> None:
    for name in ("docs", "step=3"):
        (tmp_path / name).mkdir()
    asked = str(tmp_path / "step=4")
    with pytest.raises(UserError, match="; or give best or last$") as told:
        find_place("test", asked, name="run", root=tmp_path, configs=[])
    assert "there are" not in str(told.value)
    (tmp_path / "step=3" / MANIFEST).touch()
    with pytest.raises(UserError, match="does not exist; there are step=3; or give best or last$"):
        find_place("test", asked, name="run", root=tmp_path, configs=[])
