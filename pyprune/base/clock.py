"""A clock that waits for the device, quantiles, and interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def clock(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds that first waits until `device` has done what was asked of it."""
    if torch.device(device).type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

Job = Callable[[], Sequence[float]]


def median(samples: Sequence[float]) -> float:
    """The middle of the samples, in their unit."""
    return float(np.median(samples))


def quantiles(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """`{"p10", "p25", "p50", "p75", "p90"}` of `samples * scale`, interpolated linearly between neighbours."""
    values = np.quantile(np.asarray(samples, dtype=np.float64) * scale, QUANTILES)
    return {f"p{round(100 * q)}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


def timed(run: Callable[[], object], now: Callable[[], float], passes: int = 1, share: int = 1) -> Job:
    """A job of `passes` calls of `run`, each a sample in seconds, divided by `share` (units of work in one call)."""

    def job() -> list[float]:
        samples = []
        for _ in range(passes):
            start = now()
            run()
            samples.append((now() - start) / share)
        return samples

    return job


def interleave(
    jobs: Mapping[str, Job], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """Run the jobs in turn (a, b, c, a, b, c, ...), so that drift of the machine hits all alike.

    One round before the first warms caches, allocators and compilers; its samples are dropped.

    Args:
        jobs: each returns samples in seconds.
        rounds: recorded rounds.
        progress: called as `(done, total)` before every round.

    Returns:
        All samples of each job, in order.
    """
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        if progress:
            progress(i, rounds + 1)
        for name, job in jobs.items():
            found = job()
            if i > 0:
                samples[name].extend(found)
    return samples


def graphed(run: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """On CUDA, `run` captured into a CUDA graph, so that small kernels are timed without their launches; else `run`.

    Args:
        run: reads and writes the same memory on every call, and does not synchronise.
        device: where it runs.
    """
    if torch.device(device).type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compile and allocate outside the capture, on a side stream as it requires
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
