"""Compile the Triton kernels of the bench's cases ahead of it, so that the time of the GPU goes into measuring.

    python -m bench.gpu.warm PLAN

PLAN is a JSON file: `kinds` of the cases, `share` and `of` (which part of their variants is this process'), `dry`.
Nothing is timed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.case import builders
from bench.gpu.cases import all_cases, dry_cases
from bench.gpu.layers import Arena, Layer


@torch.no_grad()
def main(plan: str) -> None:
    """Run one call of each variant that Triton computes."""
    wanted: dict[str, Any] = json.loads(Path(plan).read_text(encoding="utf-8"))
    dry = wanted["dry"]
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.bfloat16
    arena = Arena(device, dtype, 1 << 20 if dry else 1 << 30, 1)  # one set of weights is enough
    cases = [case for case in (dry_cases() if dry else all_cases()) if case.kind in wanted["kinds"]]
    number = 0
    for case in cases:
        layer = Layer.make(case, arena)
        for name, build in builders(layer):
            if ":triton" not in name and name != "two-kernel gather":
                continue
            number += 1
            if number % wanted["of"] != wanted["share"]:
                continue
            try:
                build().calls[0]()
            except Exception as problem:  # the bench itself will say so, and where
                print(f"{case.name}: {name}: {problem}")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
