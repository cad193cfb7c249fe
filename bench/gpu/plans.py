"""The plans of the native CUDA kernels for every case of the GPU bench, as the simulator makes them without a GPU.

python -m bench.gpu.plans OUT        writes JSON: case -> configuration by configuration, and what it becomes
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu.cases import Case, all_cases
from pyprune.ffn.backends import Problem, cuda

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "simulator" / "libpyprune_simulator.so"
# Multiprocessors, bytes of shared memory of a block, clusters or not, seed of the order of execution: an H100 or H200.
HOPPER = (132, 227 * 1024, 1, 0)


def simulator() -> Path | None:
    """The library with the simulator, or None where it is not built."""
    library = Path(os.environ.get("PYPRUNE_SIMULATOR_LIBRARY") or LIBRARY)
    return library if library.is_file() else None


@contextlib.contextmanager
def planned_for(device: tuple[int, int, int, int] = HOPPER) -> Iterator[None]:
    """Within, the backend plans for `device`, which need not be here. Needs the simulator."""
    library = simulator()
    if library is None:
        raise SystemExit("plans need the simulator of the CUDA kernels: run `make native`")
    torch.ops.load_library(library)

    def plan(_: int, *sizes: Any) -> str:
        found: str = torch.ops.pyprune.plan_simulated(*sizes, list(device))
        return found

    replaced = mock.patch.object(torch.ops.pyprune, "cuda_plan", plan, create=True)
    with replaced, mock.patch.object(torch.cuda, "current_device", lambda: 0):
        yield


def problem(case: Case, gather: bool = False) -> Problem:
    """What the kernels compute in `case`."""
    shape = case.shape
    rows = shape.intermediate_size if gather else case.neurons
    form = (shape.gated, gather, shape.activation, getattr(torch, case.weights))
    return Problem("cuda", torch.bfloat16, case.tokens, shape.hidden_size, rows, case.neurons, *form)


def plans(wanted: Problem) -> list[dict[str, Any]]:
    """Every configuration that the backend offers, the default first, and its plan."""
    return [{"config": dict(c), "plan": cuda._planned(wanted, c)} for c in cuda.candidate_configs(wanted)]


def main(out: str) -> None:
    """Plan all cases that the native kernels compute."""
    cases = [c for c in all_cases() if c.kind not in ("model", "inductor") and c.tokens <= cuda._AT_ONCE]
    with planned_for():
        found = {case.name: plans(problem(case)) for case in cases}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
