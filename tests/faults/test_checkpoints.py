"""A checkpoint is whole or not there; what is damaged is refused by name, and the newest whole one is used."""

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from file_faults import fault_at
from harness import CommandLine
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import small_config
from small_saves import export, save, state_of, step_of
from transformers import AutoModelForCausalLM

from fine_tune.callbacks.step_rows import StepRows, recorded_steps, rows_of_step
from fine_tune.callbacks.vram_guard import VRAMGuard
from fine_tune.errors import RunStopped, UserError
from fine_tune.loggers import MetricsCSV
from fine_tune.runs.checkpoint import check_whole
from fine_tune.runs.checkpoint_io import FolderCheckpointIO, Saving
from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.stored_checkpoints import newest_whole
from fine_tune.saved_adapters import restore_weights

HERE = Path(__file__).parent
EVERY_STEP = ["--checkpoint.every", "1", "--checkpoint.keep", "3"]


# ---- whole or not there


def test_a_save_killed_at_any_file_operation_leaves_the_old_or_the_new_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_saves.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["passed"]
    assert len(lines) > 30  # it did stop at writes, flushes, renames and removals
    assert all(line["last"] in (1, 2) and line["best"] in (1, 2) for line in lines), lines
    steps = [line["last"] for line in lines]
    assert steps == sorted(steps)  # once there, it stays
    assert {1, 2} == set(steps)
    assert all(line["then"] == 3 and not line["hidden"] for line in lines), lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_any_file_operation_of_its_saves_can_go_on(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "2", "--data.num_workers", "0"]
    first = command_line("fit", *args, "--trainer.max_steps", 4, "--name", "base")
    assert first.code == 0, first.err
    n, passed = 1, False
    while not passed:
        folder = tmp_path / str(n) / "version_0"
        shutil.copytree(first.run("base").path, folder)
        more = ["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]
        more += ["--trainer.max_steps", "8", "--trainer.default_root_dir", str(tmp_path)]
        code = subprocess.run(
            [sys.executable, str(HERE / "fit_until_fault.py"), str(n), *more],
            env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=200,
            check=False,
        ).returncode
        assert code in (0, -signal.SIGKILL)
        passed = code == 0
        last, *_ = newest_whole(RunFolder(folder), "last")
        assert (4 if code else 8) <= int(last.name.split("step=")[1]) <= 8
        n += 1 if n < 4 else 97  # a save has about 900
    assert n > 30


# ---- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_at_any_file_operation_leaves_the_older_one_and_no_partial_files(
    tmp_path: Path, number: int
) -> None:
    save(RunFolder(tmp_path / "old"), 1)
    told, n = 0, 0

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    while True:
        n += 1
        run = RunFolder(tmp_path / str(n))
        shutil.copytree(tmp_path / "old", run.path)
        with fault_at(n, fail, removals=False) as countdown:
            try:
                save(run, 2)
            except UserError as error:
                told += "needs" in str(error) and "are free" in str(error)
        assert step_of(newest_whole(run, "last")[0]) in (1, 2)
        hidden = [p.name for p in run.checkpoints.glob(".*") if "unfinished" in p.name]
        assert not hidden, f"operation {n}"
        if countdown.left > 0:
            break
    assert told > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk has to be mounted, which only root may do")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_small_a_disk_is_told_before_a_byte_is_written(small_disk: Path) -> None:
    run = RunFolder(small_disk / "run")
    save(run, 1, size=100_000)
    with pytest.raises(UserError) as raised:
        save(run, 2, size=1_000_000)
    assert "needs 8.0 MB" in str(raised.value)
    assert "7." in str(raised.value)  # MB free
    assert [p.name for p in run.checkpoints.iterdir()] == ["epoch=1.00-step=1"]
    check_whole(run.checkpoint("last"))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["safetensors", "training state"])
def test_a_disk_that_fills_during_a_save_is_a_clear_error(small_disk: Path, where: str) -> None:
    run = RunFolder(small_disk / "run")
    save(run, 1)
    weights = 3_000_000 if where == "safetensors" else 64  # of 4 bytes

    def export_more(folder: Path, _: dict[str, torch.Tensor]) -> None:
        export(folder, {"weight": torch.zeros(weights)})
        if where == "training state":
            room = shutil.disk_usage(folder).free
            (folder / "other.bin").write_bytes(b"\0" * (room - 4096))

    with pytest.raises(
        UserError, match=r"needs .* are free \(No space left on device\); free some"
    ):
        save(run, 2, FolderCheckpointIO(export_more), size=5000)
    assert [p.name for p in run.checkpoints.iterdir()] == ["epoch=1.00-step=1"]
    assert step_of(run.checkpoint("last")) == 1  # type: ignore[arg-type]


def test_a_run_whose_disk_fills_stops_with_the_bytes_needed(
    command_line: CommandLine, fit_args: list[str], small_disk: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "2", "--trainer.default_root_dir", str(small_disk)]
    fill = ["--trainer.callbacks+=fill_disk.FillDisk", "--trainer.callbacks.at", "3"]
    fill += ["--trainer.callbacks.leave", "1000000"]
    outcome = command_line("fit", *args, *fill, root=False)
    assert outcome.code == 2, outcome.err
    assert "MB, 1.0 MB are free" in outcome.err
    assert "Traceback" not in outcome.err
    run = RunFolder(small_disk / "lightning_logs" / "run" / "version_0")
    assert run.read()["status"] == "failed"
    assert [p.name for p in run.checkpoints.iterdir()] == ["epoch=0.40-step=2"]
    check_whole(run.checkpoint("last"))  # type: ignore[arg-type]


def test_a_disk_full_of_logs_is_one_warning_and_no_row_is_lost(
    command_line: CommandLine, fit_args: list[str], small_disk: Path
) -> None:
    args = [*fit_args, "--trainer.default_root_dir", str(small_disk), "--data.split", "none"]
    args += ["--data.epochs", "16", "--checkpoint.every", "1000"]
    fill = ["--trainer.callbacks+=fill_disk.FillDisk", "--trainer.callbacks.at", "2"]
    fill += ["--trainer.callbacks.leave", "0", "--trainer.callbacks.until", "60"]
    outcome = command_line("fit", *args, *fill, root=False)
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out.count("metrics.csv cannot be written") == 1
    assert outcome.out.count("train.log cannot be written") <= 1
    run = RunFolder(small_disk / "lightning_logs" / "run" / "version_0")
    rows = (run.path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 81))]
    straight = command_line("fit", *args, "--name", "straight", root=False)
    ids = [run.path / "rows", run.path.parents[1] / "straight" / "version_0" / "rows"]
    ours, theirs = ([rows_of_step(of_run, step) for step in range(1, 81)] for of_run in ids)
    assert straight.code == 0 and ours == theirs and all(ours)
    assert run.read()["status"] == "finished"


def test_rows_of_steps_wait_for_room_on_a_full_disk(small_disk: Path) -> None:
    callback, folder = StepRows(), small_disk / "run"
    trainer: Any = SimpleNamespace(
        loggers=[SimpleNamespace(save_dir=str(folder))], global_rank=0, is_global_zero=True
    )
    trainer.global_step, trainer.world_size = 0, 1
    module: Any = None
    ids = [list(range(10**6 * step, 10**6 * step + 40 + step % 3)) for step in range(200)]
    callback.on_train_start(trainer, module)
    for step in range(200):
        if step == 20:
            (small_disk / "filler").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
        if step == 150:
            (small_disk / "filler").unlink()
        trainer.global_step = step
        callback.on_train_batch_start(trainer, module, {"row_ids": ids[step]}, 0)
        if step == 149:
            assert recorded_steps(folder / "rows")[1] < 150  # type: ignore[index]
    callback.teardown(trainer, module, "fit")
    assert [rows_of_step(folder / "rows", step + 1).get(0) for step in range(200)] == ids


@pytest.mark.parametrize("name", ["facts.json", "config.yaml", "data.json"])
def test_a_disk_that_is_full_at_the_start_is_told_with_its_bytes(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real_open = io.open

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if name in str(file) and set(mode) & set("wax"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(io, "open", full)
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 2, outcome.err
    assert "cannot be written: No space left on device; it needs about " in outcome.err
    assert " are free; free some, or set " in outcome.err
    assert "step 1/" not in outcome.out
    assert not list(outcome.root.rglob("*unfinished*"))


def test_a_resume_whose_metrics_find_no_room_is_told(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command_line("fit", *fit_args, "--data.epochs", "1").run()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsCSV, "_rewrite", full)
    longer = ["--config", run.path / "config.yaml", "--data.epochs", "2", "--ckpt_path", "last"]
    outcome = command_line("fit", *longer, root=False)
    assert outcome.code == 2
    assert "metrics.csv' cannot be written: No space left on device; it needs" in outcome.err


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    command_line: CommandLine, fit_args: list[str], small_disk: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for root, reason in ((small_disk, "Read-only file system"), (file / "x", "Not a directory")):
        refused = command_line("fit", *fit_args, "--trainer.default_root_dir", root, root=False)
        assert refused.code == 2
        assert "trainer.default_root_dir" in refused.err
        assert reason in refused.err
        assert "step 1/" not in refused.out


# ---- a run that is refused


def test_a_run_refused_before_its_first_step_writes_no_checkpoint_over_its_best(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command_line("fit", *fit_args, "--data.epochs", "1").run()
    before, files = run.read(), files_of(run)
    assert before["best_score"] is not None

    def refuse(*_: Any) -> None:
        raise RunStopped("one row does not fit")

    monkeypatch.setattr(VRAMGuard, "on_train_start", refuse)
    config = run.path / "config.yaml"
    longer = ["--data.epochs", "2", "--ckpt_path", "last"]
    resumed = command_line("fit", "--config", config, *longer, root=False)
    assert resumed.code == 2 and "one row does not fit" in resumed.err
    after = run.read()
    assert files_of(run) == files
    for key in ("best", "best_score", "last", "checkpoints"):
        assert after[key] == before[key]
    refused = command_line("fit", *fit_args, "--name", "new")
    assert refused.code == 2
    assert not list(refused.run("new").checkpoints.glob("*"))


def files_of(run: RunFolder) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.checkpoints.rglob("*") if p.is_file()}


# ---- damage


def test_a_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 1)
    folder = RunFolder(tmp_path).checkpoint("last")
    assert folder is not None
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = file.read_bytes()
        for share in (0, 0.01, 0.5, 0.99):
            file.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(UserError, match=file.name):
                check_whole(folder)
        file.write_bytes(content)
    check_whole(folder)


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 1)
    folder = RunFolder(tmp_path).checkpoint("last")
    assert folder is not None
    sample = random.Random(0)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = file.read_bytes()
        for _ in range(100):
            damaged, place = bytearray(content), sample.randrange(8 * len(content))
            damaged[place // 8] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            with pytest.raises(UserError) as raised:
                check_whole(folder)
            assert str(folder) in str(raised.value)
        file.write_bytes(content)
    check_whole(folder)


def test_a_damaged_last_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    straight = command_line("fit", *fit_args, *EVERY_STEP, "--name", "straight")
    constant = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "8"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *fit_args, *EVERY_STEP, *constant)
    run = straight.run("run")
    last = run.checkpoint("last")
    assert last is not None
    damaged = cut(last / "model.safetensors")
    refused = command_line("fit", *fit_args, *EVERY_STEP, "--ckpt_path", last)
    assert refused.code == 2
    assert str(damaged) in refused.err
    resumed = command_line("fit", *fit_args, *EVERY_STEP, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert str(damaged) in resumed.out
    before = [c for c in run.read()["starts"]][-1]["from_step"]
    assert f"(step {before}) instead" in resumed.out
    assert before < 7
    assert [int(row["step"]) for row in resumed.metrics()] == list(range(1, 11))
    assert_same_weights(straight.run("straight"), run)


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, *EVERY_STEP, "--trainer.val_check_interval", 2).run()
    record = run.read()
    scored = sorted((c for c in record["checkpoints"] if c["score"]), key=lambda c: c["score"])
    damaged = cut(run.checkpoints / record["best"] / "training_state.pt")
    tested = command_line(
        "test", "--config", run.path / "config.yaml", "--ckpt_path", "best", root=False
    )
    assert tested.code == 0, tested.err
    assert str(damaged) in tested.out
    assert run.read()["results"][-1]["checkpoint"] == scored[1]["name"]


def test_a_whole_checkpoint_the_record_does_not_know_yet_is_the_last(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "6"]
    args = [*fit_args, *EVERY_STEP, "--trainer.val_check_interval", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    run = straight.run("run")
    *before, newest = run.read()["checkpoints"]
    run.update({"checkpoints": before, "last": before[-1]["name"]})  # as a kill leaves it
    (run.checkpoints / ".epoch=1.20-step=6.unfinished").mkdir()
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert run.read()["starts"][-1]["from_step"] == newest["step"]
    assert not list(run.checkpoints.glob(".*"))
    assert {c["name"] for c in run.read()["checkpoints"]} == {
        p.name for p in run.checkpoints.iterdir()
    }
    assert_same_weights(straight.run("straight"), run)


# ---- beside training


class Gate:
    """An export that waits until it is let through."""

    def __init__(self, inner: Any = export) -> None:
        self.inner, self.open, self.reached = inner, threading.Event(), threading.Event()

    def __call__(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        self.reached.set()
        assert self.open.wait(20)
        self.inner(folder, state_dict)


def test_what_is_written_is_the_state_at_the_save_whatever_the_next_steps_do(
    tmp_path: Path,
) -> None:
    gate = Gate()
    io = FolderCheckpointIO(gate)
    state = state_of(1)
    io.save_checkpoint(state, tmp_path / "one", Saving())
    assert gate.reached.wait(20)
    state["state_dict"]["weight"].fill_(2)
    state["optimizer_states"][0]["momentum"].fill_(2)
    state["global_step"] = 2
    assert not (tmp_path / "one").exists()
    gate.open.set()
    io.wait()
    assert step_of(tmp_path / "one") == 1


@pytest.mark.parametrize("kind", ["full, tied", "full", "lora"])
def test_a_model_that_trains_on_is_written_as_it_was(tmp_path: Path, kind: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(
        small_config(num_hidden_layers=1, tie_word_embeddings=kind == "full, tied")
    )
    if kind == "lora":
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def export_model(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        model.save_pretrained(str(folder), state_dict=state_dict)

    gate = Gate(export_model)
    io = FolderCheckpointIO(gate)
    io.save_checkpoint(
        {"global_step": 1, "state_dict": model.state_dict()}, tmp_path / "x", Saving()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    gate.open.set()
    io.wait()
    if kind != "lora":
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
        assert all(torch.equal(p, before[name]) for name, p in opened.named_parameters())
    restore_weights(model, tmp_path / "x")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    gate = Gate()
    io = FolderCheckpointIO(gate)
    io.save_checkpoint(state_of(1), tmp_path / "one", Saving())
    second = threading.Thread(
        target=io.save_checkpoint, args=(state_of(2), tmp_path / "two", Saving())
    )
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.open.set()
    second.join(20)
    assert (tmp_path / "one").is_dir()
    io.wait()
    assert [step_of(tmp_path / name) for name in ("one", "two")] == [1, 2]


@pytest.mark.parametrize("then", ["wait", "save_checkpoint", "load_checkpoint", "teardown"])
def test_a_write_that_failed_is_told_at_the_next_occasion(tmp_path: Path, then: str) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    io = FolderCheckpointIO(broken)
    io.save_checkpoint(state_of(1), tmp_path / "one", Saving())
    more: dict[str, tuple[Any, ...]] = {
        "save_checkpoint": (state_of(2), tmp_path / "two", Saving()),
        "load_checkpoint": (tmp_path / "one",),
    }
    with pytest.raises(UserError, match="'.*one' cannot be written: Input/output error"):
        getattr(io, then)(*more.get(then, ()))
    assert not list(tmp_path.iterdir())


def test_the_record_says_how_long_training_stood_still(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, *EVERY_STEP).run()
    checkpoints = run.read()["checkpoints"]
    assert len(checkpoints) > 1
    for checkpoint in checkpoints:
        folder = run.checkpoints / checkpoint["name"]
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert checkpoint["bytes"] == size
        assert checkpoint["blocked_ms"] > 0
        assert checkpoint["write_seconds"] > 0


def cut(file: Path) -> Path:
    """Leave half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


def assert_same_weights(one: RunFolder, other: RunFolder) -> None:
    first, second = (
        load_file(run.checkpoint("last") / "model.safetensors")  # type: ignore[operator]
        for run in (one, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("entry", [{"checkpoints": [{"name": "epoch=1.00-step=5"}]}, {"starts": 3}])
def test_a_record_of_another_form_is_refused_and_not_written_over(
    command_line: CommandLine, fit_args: list[str], entry: dict[str, Any]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    file = run.path / "run.json"
    changed = json.dumps({**run.read(), **entry})
    file.write_text(changed)
    config = run.path / "config.yaml"
    refused = command_line(
        "fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "2", root=False
    )
    assert refused.code == 2
    assert f"{file}: the run's record is damaged: {next(iter(entry))} must be a list" in refused.err
    assert file.read_text() == changed
