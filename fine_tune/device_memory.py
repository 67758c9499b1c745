"""How full a device's memory is: one small interface, so that tests can play any device."""

import os
import platform
import re
from pathlib import Path
from typing import Protocol

import psutil
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from fine_tune.container_memory import memory_limits

PROCESS = Path(
    "/proc/self"
)  # Linux keeps the largest size a process had since it was told to forget
HEADROOM = 0.1  # of a device, left free where a run chooses how much it takes
MEMORY_ERRORS = (RuntimeError, MemoryError)  # the types that memory's errors have
LIBRARIES_WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


class DeviceMemory(Protocol):
    """What a guard may ask of a device; all sizes in bytes."""

    can_run_out: bool  # whether running out is an error that can be caught

    def total(self) -> int:
        """Memory of the device."""

    def used(self) -> int:
        """Used on the device by all processes."""

    def reserved(self) -> int:
        """Held by this process, its caches included."""

    def allocated(self) -> int:
        """Used by this process."""

    def peak(self) -> int:
        """The most this process has used since ``reset_peak``."""

    def reset_peak(self) -> None:
        """Start to measure the peak anew."""

    def clear_cache(self) -> None:
        """Give back what this process holds and does not use."""


class CudaMemory:
    """A CUDA device; what other processes use of it is counted by the driver."""

    can_run_out = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def clear_cache(self) -> None:
        torch.cuda.empty_cache()


class HostMemory:
    """The machine's own memory, or as much of it as a container or a batch job may use."""

    can_run_out = False  # the system ends the process, without an error to catch

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = 0  # the most seen when asked
        self._is_kept = False  # whether the system keeps the true one

    def total(self) -> int:
        return min(
            [int(psutil.virtual_memory().total), *(limit.total for limit in memory_limits())]
        )

    def used(self) -> int:
        left = [limit.total - limit.used for limit in memory_limits()]
        return self.total() - max(0, min([int(psutil.virtual_memory().available), *left]))

    def reserved(self) -> int:
        return self.allocated()

    def allocated(self) -> int:
        now = int(self._process.memory_info().rss)
        self._peak = max(self._peak, now)
        return now

    def peak(self) -> int:
        return max(self._peak, self.allocated(), _largest_size() if self._is_kept else 0)

    def reset_peak(self) -> None:
        self._peak = 0
        try:
            (PROCESS / "clear_refs").write_text("5")
            self._is_kept = True
        except OSError:
            self._is_kept = False

    def clear_cache(self) -> None:
        """Nothing is cached."""


def _largest_size() -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def memory_of(device: torch.device) -> DeviceMemory:
    """Return the memory of a device."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def device_name(device: torch.device) -> str:
    """Return what a device is, with its memory."""
    total = memory_of(device).total() / 2**30
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({total:.0f} GiB)"
    model = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.isfile("/proc/cpuinfo") else ()
    ):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores ({total:.0f} GiB)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, one of ``MEMORY_ERRORS``, says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_oom_error(error):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in LIBRARIES_WORDS)
