"""Memory of this process: its peak over a stretch of work, and giving freed memory back."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import TracebackType

import psutil


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


class PeakMemory:
    """Sample the process's resident size in a thread; `start`, `peak` and `growth` are in bytes.

    A sample every 5 ms; allocations that live shorter are missed.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self._interval = interval
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.start = self.peak = 0

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)
