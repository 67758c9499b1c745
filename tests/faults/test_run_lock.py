"""A run folder has one owner; what a dead one left behind is recognised; a name is taken once."""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import filelock
import pytest
from harness import CommandLine
from processes import SLOW, assert_same_run, resume, start, wait_for_step

from fine_tune import folder_cli
from fine_tune.errors import UserError
from fine_tune.runs.places import Place, claim
from fine_tune.runs.run_folder import RunFolder, new_version
from fine_tune.runs.run_lock import LOCK, OWNER, TAKE_OVER_VARIABLE, RunLock

STOP_AT_4 = [
    *("--trainer.callbacks+=signal_at.SignalAt", "--trainer.callbacks.name=SIGTERM"),
    "--trainer.callbacks.step=4",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "version_0"
    path.mkdir()
    return path


def leave_owner(folder: Path, **changes: object) -> None:
    owner = {"pid": 2**22 + 1, "started": 0.0, "host": socket.gethostname(), "verb": "fit"}
    (folder / OWNER).write_text(json.dumps({**owner, "since": "noon", **changes}))


def test_a_second_process_on_a_run_folder_is_refused_and_the_first_goes_on(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    process = start([*args, *SLOW, "--trainer.callbacks.seconds", "1.5"], tmp_path)
    run = straight.run("run")
    wait_for_step(run, 2)
    config = run.path / "config.yaml"
    for verb in ("fit", "validate"):
        second = command_line(verb, "--config", config, "--ckpt_path", "last", root=False)
        assert second.code == 2
        assert f"is in use by process {process.pid} on {socket.gethostname()} (fit, " in second.err
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert_same_run(straight, straight)
    assert run.read()["status"] == "finished"


def test_a_start_that_is_refused_writes_nothing_into_the_folder(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--checkpoint.every", "2").run()
    lock = RunLock(run.path, "fit")
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    again = ["--config", run.path / "config.yaml", "--ckpt_path", "last", "--report", "en"]
    refused = command_line("fit", *again, root=False)
    lock.release()
    assert refused.code == 2 and "is in use by process" in refused.err
    (run.path / OWNER).touch()
    after = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    assert {p for p in before.keys() ^ after.keys() if p.name != OWNER} == set()
    assert {p for p in before if p.name != OWNER and before[p] != after[p]} <= {run.path}


@pytest.mark.parametrize(
    "called", ["RunLock", "check_same_run"]
)  # weights are hashed in the latter
def test_a_run_that_somebody_else_has_taken_further_meanwhile_is_not_thrown_back(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    """Its checkpoint was chosen, then the other process saved its last one and gave the folder back."""
    run = command_line("fit", *fit_args, "--checkpoint.every", "2", *STOP_AT_4).run()

    def after_another(*args: Any, **kwargs: Any) -> Any:
        run.update({"status": "finished", "step": 10})
        return original(*args, **kwargs)

    original = getattr(folder_cli, called)
    monkeypatch.setattr(folder_cli, called, after_another)
    again = ["--config", run.path / "config.yaml", "--ckpt_path", "last"]
    refused = command_line("fit", *again, "--trainer.callbacks", "null", root=False)
    assert refused.code == 2
    assert "another process has gone on with it meanwhile" in refused.err
    assert run.read()["step"] == 10 and not (run.path / OWNER).exists()


def test_the_lock_of_a_killed_run_with_data_workers_is_taken_over(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--checkpoint.every", "1", "--data.num_workers", "2"]
    straight = command_line("fit", *args, "--name", "straight")
    process = start([*args, *SLOW], tmp_path)
    run = straight.run("run")
    wait_for_step(run, 3)
    process.kill()
    process.wait(20)
    resumed = resume(command_line, run)  # at once: its workers live on for some seconds
    assert f"took over the lock of process {process.pid}, which is gone" in resumed.out
    assert_same_run(straight, resumed)
    assert not (run.path / OWNER).exists()


def test_a_lock_is_held_until_it_is_released(folder: Path) -> None:
    first = RunLock(folder, "fit")
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* \(fit, since 20"):
        RunLock(folder, "test")
    first.release()
    RunLock(folder, "test").release()
    assert not (folder / OWNER).exists()


@pytest.mark.parametrize(
    "changes",
    [{}, {"pid": os.getpid(), "started": 1.0}],
    ids=["no such process", "another process has its number"],
)
def test_a_stale_lock_of_this_machine_is_taken_over(
    folder: Path, changes: dict[str, object]
) -> None:
    leave_owner(folder, **changes)
    lock = RunLock(folder, "fit")
    assert json.loads((folder / OWNER).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_of_another_machine_is_refused_with_the_way_to_remove_it(folder: Path) -> None:
    leave_owner(folder, host="node7")
    with pytest.raises(UserError) as refused:
        RunLock(folder, "fit")
    assert "in use by process 4194305 on node7 (fit, since noon)" in str(refused.value)
    assert f"remove '{folder / OWNER}'" in str(refused.value)
    (folder / OWNER).unlink()
    RunLock(folder, "fit").release()


def test_a_sweep_takes_over_from_a_worker_on_another_machine_that_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_owner(folder, host="node7")
    monkeypatch.setenv(TAKE_OVER_VARIABLE, "1")
    lock = RunLock(folder, "fit")
    with pytest.raises(UserError, match="is in use"):  # but never from one that has the lock
        RunLock(folder, "fit")
    lock.release()


def test_a_requeued_job_takes_over_from_its_start_on_another_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_owner(folder, host="node7", slurm_job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    RunLock(folder, "fit").release()


@pytest.mark.parametrize("left", ['{"pid": 1', "5"])
def test_an_owner_record_cut_off_by_a_crash_is_stale(folder: Path, left: str) -> None:
    (folder / OWNER).write_text(left)
    RunLock(folder, "fit").release()


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")]
)
def test_a_run_folder_that_cannot_be_written_is_refused(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
) -> None:
    acquire = filelock.FileLock.acquire

    def refuse(lock: filelock.FileLock, *args: float, **settings: float) -> object:
        if Path(lock.lock_file).name == LOCK:
            raise error
        return acquire(lock, *args, **settings)

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    refused = command_line("fit", *fit_args)
    assert refused.code == 2
    assert f"version_0' cannot be written: {error.strerror}" in refused.err


def test_a_root_that_cannot_be_written_is_refused_before_the_first_step(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    refused = command_line("fit", *fit_args, "--trainer.default_root_dir", "/proc", root=False)
    assert refused.code == 2
    assert "/proc" in refused.err


def _claim(root: str, barrier: object, versions: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    versions.put(new_version(Path(root), "run").path.name)  # type: ignore[attr-defined]


def test_runs_started_at_the_same_instant_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, versions = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_claim, args=(str(tmp_path), barrier, versions)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    taken = sorted(versions.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
    assert taken == [f"version_{i}" for i in range(4)]


def test_a_root_below_the_home_is_found_by_its_tilde(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "home.yaml"
    config.write_text(
        "trainer: {default_root_dir: ~/runs, max_steps: 1}\ndata: {init_args: {cache_dir: ~/tokens}}\n"
    )
    done = command_line("fit", *fit_args, "--config", config, root=False)
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "lightning_logs" / "run" / "version_0" / "run.json").is_file()
    assert (tmp_path / "tokens" / "tokens").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_finished_run_is_never_written_to_by_another_fit(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    short = [*fit_args, "--trainer.max_steps", "2"]
    first = command_line("fit", *short).run()
    before = {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    again = command_line("fit", "--config", first.path / "config.yaml", root=False)
    assert again.code == 0, again.err
    assert {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()} == before
    assert (first.path.parent / "version_1" / "run.json").is_file()


def test_records_written_by_two_processes_are_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert "value" in run.read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


def _write(path: Path, number: int) -> None:
    for _ in range(30):
        RunFolder(path).update({"value": str(number) * 10_000 * number})


def test_a_run_whose_name_is_a_link_is_refused_and_nothing_is_written_through_it(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    other, logs = tmp_path / "elsewhere", tmp_path / "lightning_logs"
    other.mkdir()
    logs.mkdir()
    (logs / "run").symlink_to(other)
    refused = command_line("fit", *fit_args, "--trainer.max_steps", 1)
    assert refused.code == 2 and "Traceback" not in refused.err
    assert f"'{logs / 'run'}' is a link to '{other}'" in refused.err and "--name" in refused.err
    assert list(other.iterdir()) == []


@pytest.mark.parametrize("link", ["", "version_0", "version_0/checkpoints", "version_0/rows"])
def test_a_run_to_go_on_in_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setenv("FINE_TUNE_RUN_FOLDER", "")
    version = tmp_path / "lightning_logs" / "run" / "version_0"
    for name in ("checkpoints", "rows"):
        (version / name).mkdir(parents=True)
    path = version.parent / link
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        claim(Place(RunFolder(version), None), "run", tmp_path)


def test_all_logs_may_lie_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINE_TUNE_RUN_FOLDER", "")
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "lightning_logs").symlink_to(tmp_path / "large_disk")
    run = claim(Place(None, None), "run", tmp_path)
    assert claim(Place(run, None), "run", tmp_path) == run
    assert (tmp_path / "large_disk" / "run" / "version_0").is_dir()
