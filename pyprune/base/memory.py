"""Memory of this process: huge pages, its peak over a stretch of work, and giving freed memory back."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # not glibc, so there is nothing of this kind to call
    return trim


_trim = _find_trim()


def release() -> None:
    """Give freed heap pages back to the system.

    Replacing weights layer by layer leaves holes between the new ones; glibc keeps them, and the process would grow by
    about the size of the model.
    """
    if _trim is not None:
        _trim(0)


_HUGE_PAGE = 2 << 20


def huge_pages(size: int) -> Tensor | None:
    """`[size]` bytes of zeroed CPU memory, for which the system is asked to use huge pages; freed with its last view.

    Weights are read once for each token, so that with pages of 4 KB the walks of page tables show. Pages become real
    when they are written. None where the system cannot be asked.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size == 0:
        return None
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
    except OSError:
        return None  # no room for it, or a kernel without huge pages
    pool = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pool.data_ptr() % _HUGE_PAGE
    return pool[start : start + size]


class Room:
    """One stretch of memory for many tensors that are kept together, on huge pages where there are any.

    Args:
        size: bytes of all tensors, each rounded up to whole cache lines.
    """

    LINE = 64

    def __init__(self, size: int) -> None:
        self._free = huge_pages(size)

    @classmethod
    def rounded(cls, size: int) -> int:
        """`size` in bytes, rounded up to whole cache lines."""
        return -(-size // cls.LINE) * cls.LINE

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        count = math.prod(shape)
        size = self.rounded(count * dtype.itemsize)
        if self._free is None or device.type != "cpu" or not 0 < size <= len(self._free):
            return None
        place, self._free = self._free[:size], self._free[size:]
        return place.view(dtype)[:count].view(shape)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An unwritten contiguous tensor in this room; elsewhere where it is on another device or does not fit."""
        place = self._place(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device) if place is None else place

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor` in this room; itself where it is on another device or does not fit."""
        place = self._place(tuple(tensor.shape), tensor.dtype, tensor.device)
        return tensor if place is None else place.copy_(tensor)


# Where Linux says what a container may use, and uses: control groups of version 2, and 1.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _left(group: str, limit: str, used: str, cached: str) -> int:
    """What a control group may still use; files that are only cached count as free."""
    folder = Path(group)
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(facts.get(cached, 0))


def available() -> int:
    """Bytes that this process can still get: of the machine, of its container, and of its own limit of addresses."""
    found = [int(psutil.virtual_memory().available)]
    for group in _GROUPS:
        try:
            found.append(_left(*group))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(soft - psutil.Process().memory_info().vms)
    except ImportError:  # Windows
        pass
    return max(0, min(found))


def device_available(device: torch.device) -> int:
    """Bytes of a CUDA device that this process's tensors can still get, within the share of it that torch may take."""
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = torch.cuda.memory.get_per_process_memory_fraction(device)
    return max(0, min(free + held, int(share * total)) - used)


class PeakMemory:
    """Sample the process's resident size in a thread; `start`, `peak` and `growth` are in bytes.

    A sample every 5 ms; allocations that live shorter are missed. `device_peak` is what tensors on a CUDA device held
    at most since the start, by torch's own count; 0 for another device.
    """

    def __init__(self, interval: float = 0.005, device: torch.device | None = None) -> None:
        self._interval = interval
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.start = self.peak = 0

    @property
    def growth(self) -> int:
        return self.peak - self.start

    @property
    def device_peak(self) -> int:
        return 0 if self._device is None else torch.cuda.max_memory_allocated(self._device)

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._process.memory_info().rss
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)
