"""The two ceilings, measured on this device in this run: how fast memory is read, how fast bfloat16 is multiplied."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import Timer
from pyprune.base.clock import median, quantiles

READ_BYTES = 4 << 30
GEMM = 8192


def read_loops(buffer: Tensor, multiprocessors: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Plain loops over `buffer` (float32 numbers), by name, each with the bytes that it reads or writes."""
    size = buffer.numel() * buffer.element_size()
    matrix = buffer.view(-1, 4096)
    vector = torch.ones(4096, device=buffer.device)
    target = torch.empty_like(buffer[: len(buffer) // 2])
    loops: dict[str, tuple[Callable[[], object], int]] = {
        "sum": (buffer.sum, size),
        "amax": (buffer.amax, size),
        "matrix-vector": (lambda: matrix @ vector, size),
        "copy (read and written)": (lambda: target.copy_(buffer[: len(target)]), size),
    }
    try:
        reader = importlib.import_module("bench.gpu.read").reader
    except ImportError:
        return loops
    for a_multiprocessor in (2, 4, 8):
        programs = a_multiprocessor * multiprocessors
        try:
            _, read = reader(buffer, programs)  # compiles
        except Exception:  # no Triton here
            break
        loops[f"Triton, {a_multiprocessor} programs a multiprocessor"] = (
            lambda programs=programs: reader(buffer, programs),
            read,
        )
    return loops


def read_bandwidth(timer: Timer, size: int = READ_BYTES, multiprocessors: int = 1) -> dict[str, Any]:
    """The highest median of the loops, in GB/s, and what each of them reached."""
    buffer = torch.rand(size // 4 // 4096 * 4096, device=timer.device)
    found: dict[str, dict[str, float]] = {}
    for name, (run, read) in read_loops(buffer, multiprocessors).items():
        timer.seconds(run, 3)
        found[name] = quantiles([read / s / 1e9 for s in timer.seconds(run, 15)])
    best = max(found, key=lambda name: found[name]["p50"])
    return {"gb_s": found[best]["p50"], "loop": best, "loops": found, "bytes": size}


def gemm_rate(timer: Timer, dtype: torch.dtype, n: int = GEMM) -> dict[str, Any]:
    """TFLOP/s of one product of two n x n matrices of random numbers, by the median."""
    a, b = (torch.randn(n, n, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timer.seconds(lambda: torch.mm(a, b, out=out), 5)
    samples = timer.seconds(lambda: torch.mm(a, b, out=out), 15)
    return {
        "tflop_s": 2 * n**3 / median(samples) / 1e12,
        "quantiles": quantiles([2 * n**3 / s / 1e12 for s in samples]),
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
    }
