"""The energy GPUs take, by the counter that NVML keeps in each of them: read twice, nothing is sampled."""

from collections.abc import Callable
from typing import Any

import torch

MILLIJOULES_PER_WATT_HOUR = 3_600_000


class EnergyMeter:
    """Watt-hours since it was made.

    Args:
        read: Returns the millijoules counted so far.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self._read, self._start = read, read()

    def watt_hours(self) -> float | None:
        """Return them; None where the counter can be read no more, as of a GPU that was lost."""
        try:
            return (self._read() - self._start) / MILLIJOULES_PER_WATT_HOUR
        except Exception:  # pynvml has an error of its own for each thing that can happen
            return None


def energy_meter(devices: list[torch.device]) -> EnergyMeter | None:
    """Return a meter over GPUs, or None where there is none, or no NVML, or no counter (before Volta).

    Args:
        devices: Of this node.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handles: list[Any] = [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}")
            for gpu in gpus
        ]
        return EnergyMeter(lambda: sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)))
    except Exception:  # pynvml has an error of its own for each thing that can be missing
        return None
