"""Timing on a GPU: many calls in one CUDA graph, over rotating weights, between two events; and a stand-in for a CPU.

A call is a function without arguments that returns a tensor. A variant has one for each of its sets of weights.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench.gpu.clocks import Clocks

Call = Callable[[], Tensor]

# A graph runs at least so long, so that its own launch and the events' resolution count for little.
GRAPH_SECONDS = 2e-3
MOST_CALLS = 1024
EAGER_CALLS = 64


@dataclass
class Replay:
    """Calls ready to be timed: `run()` makes `calls` of them; `first` and `last` are where those two's results lie.

    `holds` keeps alive what a graph reads.
    """

    run: Callable[[], object]
    calls: int
    first: Tensor
    last: Tensor
    holds: object = None


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

    def nodes(self, calls: Sequence[Call]) -> tuple[int, int | None] | None:
        """Nodes of a graph of these calls (kernels, copies, fills), and how many edges are programmatic: those by which
        a kernel begins before the one before it has ended. None where that cannot be told.
        """

    def spin(self, seconds: float) -> None:
        """Keep the device busy for so long, that its clocks are up."""

    def clocks(self) -> dict[str, int]:
        """MHz now, see `clocks.Clocks`."""


def repeats(calls: int, seconds_a_call: float) -> int:
    """How often a graph goes through `calls` calls so that it lasts GRAPH_SECONDS with at most MOST_CALLS of them."""
    wanted = GRAPH_SECONDS / max(seconds_a_call, 1e-7)
    return max(1, min(int(-(-wanted // calls)), MOST_CALLS // calls))


class _Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("_", ctypes.c_ubyte * 5),
    )


_PROGRAMMATIC, _MOST_EDGES = 1, 256


class CudaTimer:
    """CUDA graphs and events on the current device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.clocks = Clocks().read

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
            first = last = calls[0]()
            for call in itertools.islice(itertools.cycle(calls), 1, times * len(calls)):
                last = call()
        return Replay(graph.replay, times * len(calls), first, last, calls)

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
        # One more before: while it runs the host gets ahead, so that no launch shows between two events.
        replay.run()
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

    def nodes(self, calls: Sequence[Call]) -> tuple[int, int | None] | None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            raw, nodes = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
            if driver.cuGraphGetNodes(raw, None, ctypes.byref(nodes)):
                return None
            edges = ctypes.c_size_t(_MOST_EDGES)
            ends, kinds = [(ctypes.c_void_p * _MOST_EDGES)() for _ in range(2)], (_Edge * _MOST_EDGES)()
            if driver.cuGraphGetEdges_v2(raw, *ends, kinds, ctypes.byref(edges)):
                return int(nodes.value), None
            return int(nodes.value), sum(kind.type == _PROGRAMMATIC for kind in kinds[: edges.value])
        except (OSError, AttributeError, TypeError, RuntimeError):
            return None

    def spin(self, seconds: float) -> None:
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()


class WallTimer:
    """The same on a CPU by the wall clock, to try the bench's own code out."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def capture(self, calls: Sequence[Call]) -> Replay:
        return Replay(lambda: [call() for call in calls], len(calls), calls[0](), calls[-1]())

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

    def nodes(self, calls: Sequence[Call]) -> tuple[int, int | None] | None:
        return None

    def spin(self, seconds: float) -> None:
        pass

    def clocks(self) -> dict[str, int]:
        return {}
