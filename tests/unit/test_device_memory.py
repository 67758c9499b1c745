"""What counts as out of memory, and how much memory there is."""

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from harness import REPOSITORY

from fine_tune import container_memory
from fine_tune.device_memory import MEMORY_ERRORS, HostMemory, is_out_of_memory

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
OTHERS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError(),
    ValueError("CUBLAS_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_an_error_of_any_library_that_memory_ran_out_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert isinstance(error, MEMORY_ERRORS)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_whoever_asks_catches_all_types_that_say_it() -> None:
    asking = [
        file
        for file in (REPOSITORY / "fine_tune").rglob("*.py")
        if "is_out_of_memory(error)" in file.read_text() and file.name != "device_memory.py"
    ]
    assert len(asking) >= 5
    for file in asking:
        caught = re.findall(
            r"except (\w+) as error:\n[^\n]*\n?\s+if not is_out_of_memory", file.read_text()
        )
        assert set(caught) <= {"MEMORY_ERRORS"}, file


GIB = 2**30
UNLIMITED_V1 = 2**63 - 4096


def machine(
    monkeypatch: pytest.MonkeyPatch, root: Path, membership: str, files: dict[str, str]
) -> HostMemory:
    """A machine of 64 GiB, 40 of them available, with these control groups."""
    (root / "self").write_text(membership)
    for name, text in files.items():
        (root / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cgroup" / name).write_text(text)
    monkeypatch.setattr(container_memory, "MEMBERSHIP", root / "self")
    monkeypatch.setattr(container_memory, "ROOT", root / "cgroup")
    now = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now)
    return HostMemory()


V2_FILES = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
STAT = {"memory.stat": f"anon 5\ninactive_file {GIB}\ntotal_inactive_file {GIB}\n"}


@pytest.mark.parametrize(
    ("membership", "files", "total", "used"),
    [
        ("0::/\n", {}, 64, 24),
        ("0::/\n", V2_FILES, 8, 3),
        ("0::/\n", {**V2_FILES, **STAT}, 8, 2),  # cached files can be given back
        ("0::/\n", {**V2_FILES, "memory.max": "max\n"}, 64, 24),
        ("0::/host/path/not/here\n", V2_FILES, 8, 3),
        # a batch job's limit stands on a group around the process's own
        ("0::/job/step\n", {f"job/{name}": text for name, text in V2_FILES.items()}, 8, 3),
        # roomy by its limit, but the machine itself has only 40 GiB left
        ("0::/\n", {"memory.max": f"{60 * GIB}", "memory.current": "0"}, 60, 20),
    ],
)
def test_a_containers_limit_is_the_memory_there_is(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    membership: str,
    files: dict[str, str],
    total: int,
    used: int,
) -> None:
    memory = machine(monkeypatch, tmp_path, membership, files)
    assert (memory.total() / GIB, memory.used() / GIB) == (total, used)


@pytest.mark.parametrize(("limit", "total", "used"), [(8 * GIB, 8, 2), (UNLIMITED_V1, 64, 24)])
def test_the_older_control_groups_are_read_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, total: int, used: int
) -> None:
    files = {"memory.limit_in_bytes": f"{limit}", "memory.usage_in_bytes": f"{3 * GIB}", **STAT}
    files = {f"memory/docker/1/{name}": text for name, text in files.items()}
    groups = "5:cpu,cpuacct:/\n4:memory:/docker/1\n0::/\n"
    memory = machine(monkeypatch, tmp_path, groups, files)
    assert (memory.total() / GIB, memory.used() / GIB) == (total, used)


def test_where_there_are_no_control_groups_the_machines_memory_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = machine(monkeypatch, tmp_path, "", {})
    (tmp_path / "self").unlink()
    assert (memory.total() / GIB, memory.used() / GIB) == (64, 24)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's own")
def test_the_hosts_peak_holds_what_was_given_back_since() -> None:
    memory, mib = HostMemory(), 2**20
    torch.ones(400 * mib // 4)
    memory.reset_peak()
    before = memory.allocated()
    assert memory.peak() < before + 200 * mib
    torch.ones(400 * mib // 4)
    assert before + 350 * mib < memory.peak() < before + 500 * mib
    assert memory.allocated() < before + 200 * mib


def test_where_the_system_keeps_no_peak_it_is_the_most_that_was_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fine_tune.device_memory.PROCESS", tmp_path / "none", raising=False)
    memory = HostMemory()
    memory.reset_peak()
    seen = torch.ones(2**28 // 4)
    most = memory.allocated()
    del seen
    assert memory.peak() == most > memory.allocated()
