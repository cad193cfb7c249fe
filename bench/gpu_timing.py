"""Timing on a GPU: many calls in one CUDA graph, over rotating weights, between two events; and a stand-in for a CPU.

A call is a function without arguments that returns a tensor. A variant has one for each of its sets of weights.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[], Tensor]

# A graph runs at least so long, so that its own launch and the events' resolution count for little.
GRAPH_SECONDS = 2e-3
MOST_CALLS = 512
EAGER_CALLS = 64


@dataclass
class Replay:
    """Calls ready to be timed: `run()` makes `calls` of them; `first` is where the first one's result lies."""

    run: Callable[[], object]
    calls: int
    first: Tensor
    nodes: int | None = None


class Timer(Protocol):
    """What a device must offer; times are in seconds."""

    device: torch.device

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong on it."""

    def capture(self, calls: Sequence[Call]) -> Replay:
        """Warm up, then make of the calls what is replayed."""

    def sample(self, replay: Replay, count: int) -> list[float]:
        """Seconds for one call, of `count` replays."""

    def eager(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Seconds of one call launched by the host, and the host's own part of it."""

    def seconds(self, run: Callable[[], object], count: int) -> list[float]:
        """Seconds of `run`, each of `count` times, without a graph."""

    def launches(self, call: Call) -> int | None:
        """Nodes of the graph of one call: kernels, copies and fills; None where that cannot be told."""


def repeats(calls: int, seconds_a_call: float) -> int:
    """How often a graph goes through `calls` calls so that it lasts GRAPH_SECONDS with at most MOST_CALLS of them."""
    wanted = GRAPH_SECONDS / max(seconds_a_call, 1e-7)
    return max(1, min(int(-(-wanted // calls)), MOST_CALLS // calls))


class CudaTimer:
    """CUDA graphs and events on the current device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _warm(self, calls: Sequence[Call]) -> None:
        """On a side stream, as capture wants it: compile, load modules, fill the allocator."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def _graph(self, calls: Sequence[Call], times: int) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = calls[0]()
            for call in itertools.islice(itertools.chain.from_iterable(itertools.repeat(calls)), 1, times * len(calls)):
                call()
        return Replay(graph.replay, times * len(calls), first)

    def capture(self, calls: Sequence[Call]) -> Replay:
        self._warm(calls)
        once = self._graph(calls, 1)
        once.run()
        torch.cuda.synchronize()
        times = repeats(len(calls), min(self.sample(once, 3)))
        found = self._graph(calls, times) if times > 1 else once
        found.run()
        torch.cuda.synchronize()
        return found

    def seconds(self, run: Callable[[], object], count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def sample(self, replay: Replay, count: int) -> list[float]:
        return [found / replay.calls for found in self.seconds(replay.run, count)]

    def eager(self, calls: Sequence[Call]) -> tuple[float, float]:
        several = list(itertools.islice(itertools.cycle(calls), EAGER_CALLS))

        def run() -> None:
            for call in several:
                call()

        run()
        torch.cuda.synchronize()
        whole = sorted(self.seconds(run, 5))[2]
        host = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return whole / EAGER_CALLS, sorted(host)[2] / EAGER_CALLS

    def launches(self, call: Call) -> int | None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                call()
            nodes = ctypes.c_size_t(0)
            raw = ctypes.c_void_p(graph.raw_cuda_graph())
            return None if driver.cuGraphGetNodes(raw, None, ctypes.byref(nodes)) else int(nodes.value)
        except (OSError, AttributeError, TypeError, RuntimeError):
            return None


class WallTimer:
    """The same on a CPU by the wall clock, to try the bench's own code out."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def capture(self, calls: Sequence[Call]) -> Replay:
        return Replay(lambda: [call() for call in calls], len(calls), calls[0]())

    def seconds(self, run: Callable[[], object], count: int) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found

    def sample(self, replay: Replay, count: int) -> list[float]:
        return [found / replay.calls for found in self.seconds(replay.run, count)]

    def eager(self, calls: Sequence[Call]) -> tuple[float, float]:
        (whole,) = self.seconds(calls[0], 1)
        return whole, whole

    def launches(self, call: Call) -> int | None:
        return None


_CLOCKS = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"),
    *("power.draw", "power.limit", "clocks_event_reasons.active", "driver_version", "compute_mode", "mig.mode.current"),
)


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU's clocks, heat and power, as it words it; empty where it cannot."""
    for fields in (_CLOCKS, _CLOCKS[:2] + _CLOCKS[8:9]):  # a field that it does not know fails them all
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, (word.strip() for word in done.stdout.partition("\n")[0].split(",")), strict=False))
    return {}


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
