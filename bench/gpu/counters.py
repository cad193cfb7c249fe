"""Calls for a profiler to look at: each variant of a few cases once, warm, between its start and its stop.

    ncu --profile-from-start off --clock-control none --section SpeedOfLight --section WarpStateStats \
        python3 -m bench.gpu.counters [CASE:VARIANT,...]

prints the hardware's counters of these kernels: share of the memory's and the units' speed, and why warps wait. VARIANT
is a name that `bench.gpu.run` prints. The weights of a call are not those of the one before it, as there.
"""

from __future__ import annotations

import sys

import torch

from bench.gpu.case import builders
from bench.gpu.cases import all_cases
from bench.gpu.layers import Arena, Layer

DEFAULT = (
    "llama-3-8b M 1 keep 0.5:compact:cuda,llama-3-8b M 1 keep 0.5:gather:cuda,llama-3-8b M 1 keep 0.5:compact:triton,"
    "opt-6.7b M 1 keep 0.5:compact:cuda,llama-3-8b M 4 keep 0.5:compact:cuda,llama-3-8b M 16 keep 0.5:compact:triton,"
    "llama-3-8b int8 M 1 keep 0.5:int8:cuda,gpt2 M 1 keep 0.5:compact:cuda"
)


@torch.no_grad()
def main(wanted: str = DEFAULT) -> None:
    """One profiled call of each of `wanted`, two others before it."""
    arena = Arena(torch.device("cuda"), torch.bfloat16, 2 << 30)
    known = {case.name: case for case in all_cases()}
    for one in wanted.split(","):
        name, _, variant = one.partition(":")
        try:
            calls = dict(builders(Layer.make(known[name], arena)))[variant]().calls
            for call in (calls[0], calls[1 % len(calls)]):
                call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            calls[2 % len(calls)]()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        except Exception as problem:  # the others are worth their counters all the same
            print(f"{one}: {type(problem).__name__}: {problem}")


if __name__ == "__main__":
    main(*sys.argv[1:])
