"""Does every native kernel run on this GPU at all? A minute is not spent on measuring where one does not.

    python3 -m bench.gpu.smoke        prints a line for each, and ends with 1 where one was wrong or did not run

Each runs in a process of its own, since one that fails takes its process's device down with it.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from bench.gpu.case import builders, verify
from bench.gpu.cases import all_cases
from bench.gpu.layers import Arena, Layer

CASES = ("llama-3-8b M 1 keep 0.5", "opt-6.7b M 4 keep 0.5", "gpt2 M 1 keep 0.5", "llama-3-8b int8 M 1 keep 0.5")


@torch.no_grad()
def one(name: str) -> None:
    """The native kernels' variants of a case against float64."""
    case = next(case for case in all_cases() if case.name == name)
    layer = Layer.make(case, Arena(torch.device("cuda"), torch.bfloat16, 1 << 30, 1))
    for variant, build in builders(layer):
        if ":cuda" in variant:
            print(f"{name}: {variant}: {verify(build())}", flush=True)
    torch.cuda.synchronize()


def main() -> int:
    """All of them side by side."""
    running = [subprocess.Popen([sys.executable, "-m", "bench.gpu.smoke", name]) for name in CASES]
    return max(process.wait() for process in running)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1])
    else:
        sys.exit(main())
