"""The device: what it is, and how fast its clocks run; by nvidia-smi in words, by NVML in MHz within a measurement."""

from __future__ import annotations

import ctypes
import subprocess
from typing import Any

import torch

_FIELDS = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"),
    *("power.draw", "power.limit", "clocks_event_reasons.active", "driver_version", "compute_mode", "mig.mode.current"),
)
_NVML_SM, _NVML_MEMORY = 1, 2


def _uuid() -> str | None:
    """What NVIDIA's tools call torch's current GPU, whose number is another where CUDA_VISIBLE_DEVICES names some."""
    return f"GPU-{torch.cuda.get_device_properties().uuid}" if torch.cuda.is_available() else None


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the current GPU's clocks, heat and power, as it words it; empty where it cannot."""
    uuid = _uuid()
    # A field that it does not know fails them all.
    for fields in (_FIELDS, _FIELDS[:2] + _FIELDS[8:9]) if uuid else ():
        command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, (word.strip() for word in done.stdout.partition("\n")[0].split(",")), strict=False))
    return {}


class Clocks:
    """Reads the current GPU's clocks in microseconds; nothing where there is no NVML."""

    def __init__(self) -> None:
        self._device: ctypes.c_void_p | None = None
        uuid = _uuid()
        if uuid is None:
            return
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            device = ctypes.c_void_p()
            name = uuid.encode()
            if not self._nvml.nvmlInit_v2() and not self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)):
                self._device = device
        except (OSError, AttributeError):
            pass

    def read(self) -> dict[str, int]:
        """`sm_mhz` and `memory_mhz` now."""
        found: dict[str, int] = {}
        for name, kind in (("sm_mhz", _NVML_SM), ("memory_mhz", _NVML_MEMORY)) if self._device else ():
            value = ctypes.c_uint(0)
            if not self._nvml.nvmlDeviceGetClockInfo(self._device, kind, ctypes.byref(value)):
                found[name] = value.value
        return found


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, capability, multiprocessors, L2 and memory of a CUDA device; of a CPU its type only."""
    if device.type != "cuda":
        return {"name": device.type}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": int(getattr(found, "L2_cache_size", 0)),
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count(),
    }
