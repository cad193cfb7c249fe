"""What torch.compile(mode="max-autotune") makes of the dense FFNs: in a process of its own, which may be killed.

    python -m bench.gpu.inductor LINES [--dry-run]

adds a line of JSON to the file LINES for each of `cases.INDUCTOR`. The compiler's own CUDA graphs are off: its
kernels are replayed in a graph over rotating weights like everybody's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import INDUCTOR, Case, all_cases, dry_cases
from bench.gpu.layers import Arena, Layer, torch_ffn
from bench.gpu.lines import say
from bench.gpu.timing import CudaTimer, Timer, WallTimer
from pyprune.base.clock import quantiles

SAMPLES = 24


@torch.no_grad()
def measure(case: Case, arena: Arena, timer: Timer, how: dict[str, str]) -> dict[str, Any]:
    """Facts of the dense FFN of a case, compiled as `how` tells torch.compile."""
    layer = Layer.make(case, arena)
    start = time.perf_counter()
    torch._dynamo.reset()
    run = torch.compile(torch_ffn(case), dynamic=False, **how)
    sets = layer.dense_sets(case.shape.intermediate_size)
    run(*sets[0])
    timer.synchronize()
    seconds = time.perf_counter() - start
    calls = [lambda a=arguments: run(*a) for arguments in sets]
    replay = timer.capture(calls)
    spread = quantiles(timer.sample(replay, SAMPLES), 1e6)
    eager, host = timer.eager(calls)
    nodes = timer.nodes(calls[:1])
    size = layer.bytes(case.shape.intermediate_size, arena.dtype)
    return {
        "us": spread["p50"],
        "us_quantiles": spread,
        "samples": SAMPLES,
        "sets": len(sets),
        "calls": replay.calls,
        "bytes": size,
        "gb_s": size / spread["p50"] / 1e3,
        "compile_seconds": seconds,
        "eager_us": eager * 1e6,
        "host_us": host * 1e6,
        "launches": nodes and nodes[0],
        "backend": "inductor",
    }


def main(lines: str, dry: str = "") -> None:
    """Measure one after the other; a failure of one is recorded."""
    timer: Timer = WallTimer() if dry else CudaTimer()
    dtype = torch.float32 if dry else torch.bfloat16
    arena = Arena(timer.device, dtype, 1 << 20, 1 << 17) if dry else Arena(timer.device, dtype)
    # Compiling on a CPU takes long and proves little; the path around it is what a dry run is for.
    how = {"backend": "eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
    cases = {(case.shape.name, case.tokens): case for case in (dry_cases() if dry else all_cases())}
    for shape, tokens in INDUCTOR:
        name = f"{shape} M {tokens}"
        case = cases[shape, tokens]
        say(Path(lines), doing=["inductor", name])
        try:
            facts = measure(case, arena, timer, how)
        except Exception as problem:
            facts = {"failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:400]}
        say(Path(lines), inductor={name: facts})


if __name__ == "__main__":
    main(*sys.argv[1:])
