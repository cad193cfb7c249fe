"""Ceilings: how fast memory can be read, how many bytes an FFN must read, and what that allows a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.clock import clock
from ..base.errors import check
from ..base.memory import available, device_available
from ..ffn import native

_GIB = 1 << 30


@dataclass(frozen=True)
class Bandwidth:
    """Measured read bandwidth of a device's memory.

    Attributes:
        gb_s: 1e9 bytes a second, the best round of the best loop.
        loop: the loop that reached it.
        buffer_bytes: what one pass read.
        cache_bytes: size of the last-level cache that the system reports, 0 if it does not. A buffer of less than
            some multiples of it may have been read from the cache.
    """

    gb_s: float
    loop: str
    buffer_bytes: int
    cache_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache as Linux reports it, or 0. Virtual machines may report the host's."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": _GIB}.get(text[-1], 0))
    return max(sizes)


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache in front of `device`'s memory as the system reports it, or 0."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    return last_level_cache()


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`."""
    device = torch.device(device)
    return device_available(device) if device.type == "cuda" else available()


def buffer_bytes(device: torch.device | str) -> int:
    """Bytes to read: four times the last-level cache and at least 1 GiB, but at most a quarter of the free memory."""
    wanted = max(_GIB, 4 * cache_bytes(torch.device(device)))
    return min(wanted, free_memory(device) // 4)


def read_loops(matrix: Tensor) -> dict[str, Callable[[], object]]:
    """Plain read loops over `matrix` (`[R, C]` float32, contiguous), by name.

    Which is fastest depends on the machine and on the build of torch.
    """
    vector = torch.ones(matrix.shape[1], device=matrix.device)
    loops: dict[str, Callable[[], object]] = {
        "sum": matrix.sum,
        "amax": matrix.amax,
        "matrix-vector": lambda: matrix @ vector,
    }
    if matrix.device.type == "cpu" and native.load() is None:
        loops["native"] = lambda: torch.ops.pyprune.cpu_read(matrix)
    return loops


def read_bandwidth(device: torch.device | str = "cpu", rounds: int = 5) -> Bandwidth:
    """Measure how fast torch's threads (or a GPU) read memory.

    Args:
        device: `cpu` or a CUDA device.
        rounds: passes of every loop; the best one counts, since a ceiling is asked for.
    """
    device = torch.device(device)
    columns = 4096
    rows = max(1, buffer_bytes(device) // (4 * columns))
    # Written once: pages that nobody wrote all map to one page of zeros, which is read from the cache.
    matrix = torch.ones(rows, columns, device=device)
    now = clock(device)
    best, name = float("inf"), ""
    for loop, run in read_loops(matrix).items():
        run()
        for _ in range(rounds):
            start = now()
            run()
            seconds = now() - start
            if seconds < best:
                best, name = seconds, loop
    size = matrix.numel() * matrix.element_size()
    return Bandwidth(size / best / 1e9, name, size, cache_bytes(device))


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of the whole when `share` of its time becomes `speedup` times faster: `1 / (1 - share + share/speedup)`.

    Raises:
        InputError: `share` outside [0, 1], or `speedup` not above 0.
    """
    check(0 <= share <= 1, "share", "lie in [0, 1]", share)
    check(speedup > 0, "speedup", "be above 0", speedup)
    return 1 / (1 - share + share / speedup)
