"""Experts of mixtures on a GPU: PrunedMoE by Triton and by torch against Transformers' own paths, in one process.

    python3 -m bench.gpu.experts [--out FILE] [--budget 60]      writes bench/results/experts-gpu.json
    python3 -m bench.gpu.experts --dry-run --out FILE            the same code on a CPU, tiny; its numbers mean nothing

with `bench/checkout` and the checkout itself on PYTHONPATH where pyprune is not installed.

A case is a mixture, a share of kept neurons and a number of tokens M, in bfloat16 with random weights: one layer's
experts after the router, over two layers and many routings, so that the L2 does not hold what the next call reads.
Each variant is checked against float64 first; a wrong one is recorded and not timed. Then as many calls as last 2 ms
are captured in a CUDA graph, and the variants of a case take turns. What cannot be captured, since it waits for the
device, is timed as the host launches it, and says so (`captured`). For M = 1 `eager_us` and `host_us` are those of a
call without a graph.

    triton, torch, cuda                 PrunedMoE by these backends, over the kept neurons; cuda for few tokens
    triton gather, cuda gather          the same number of neurons, chosen by chance for each expert, of all in memory
    triton #2 ...                       by further configurations, as far as time goes, after all cases
    grouped_mm, batched_mm, eager       Transformers' module with all neurons; `pruned ...` with the kept ones only

`bytes` are those of the experts that a call names, read once; `floor_us` is the time for them at the speed of a read
loop, measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch

from bench import by_line
from bench.gpu import ceilings, output, stages
from bench.gpu.clocks import device_facts
from bench.gpu.expert_cases import ROUTINGS, Case, Layers, Routings
from bench.gpu.expert_rows import PER_ROUND, compare, line, prepare, sample
from bench.gpu.expert_ways import by_config, candidates, our_ways, transformers_ways
from bench.gpu.timing import CudaTimer, Timer, WallTimer
from bench.mixtures import SHAPES, Shape
from pyprune.base import machine

RESULT = Path(__file__).parents[1] / "results" / "experts-gpu.json"
TOKENS = (1, 4, 16, 256)
KEEPS = (1.0, 0.5)
ROUNDS = 4
WARMERS = 8


def warm(number: int, of: int) -> None:
    """Compile this process' share of all kernels into Triton's cache, by calls over few experts."""
    from pyprune import triton_kernels as kernels

    device = torch.device("cuda")
    few = 8  # how many there are, the kernels do not know when they are compiled
    jobs = [
        (shape, keep, tokens, config)
        for shape in SHAPES.values()
        for tokens in TOKENS
        for keep in KEEPS
        for config in candidates(shape, keep, tokens, device)
    ]
    for shape, keep, tokens, config in jobs[number::of]:
        f, d = round(keep * shape.intermediate_size), shape.hidden_size
        rows = torch.zeros(few, f, 3 * d, device=device, dtype=torch.bfloat16)
        given = Routings.make(replace(shape, experts=few), tokens, device, 1)
        with contextlib.suppress(Exception):  # the bench itself will say so, and where
            arguments = (given.x[0], rows, given.index[0], given.weights[0])
            kernels.moe(*arguments, gated=True, activation="silu", config=config)
    torch.cuda.synchronize()


def tiny() -> dict[str, Shape]:
    """Shapes for a rehearsal."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "experts": 4, "picked": 2}
    return {name: replace(shape, **small) for name, shape in SHAPES.items()}


class Bench:
    """All cases, and the result as it grows: whole on disk after every case."""

    def __init__(self, path: Path, dry: bool, budget: float) -> None:
        self.path, self.dry, self.budget, self.until, self.start = path, dry, budget, 0.0, time.time()
        self.timer: Timer = WallTimer() if dry else CudaTimer()
        self.shapes, self.tokens = (tiny(), (1, 4)) if dry else (SHAPES, TOKENS)
        self.rounds, self.routings, self.configs = (1, 2, 2) if dry else (ROUNDS, ROUTINGS, None)
        self.built: list[Layers] = []
        self.cases: list[Case] = []
        self.result: dict[str, Any] = {
            "suite": "gpu-experts",
            "state": "running",
            **({"dry_run": True} if dry else {}),
            "settings": {"budget_seconds": budget, "rounds": self.rounds, "per_round": PER_ROUND},
            "rows": [],
            "left_out": [],
        }

    def write(self) -> None:
        """Put the result as it is now into the file."""
        self.result["seconds"] = time.time() - self.start
        self.result["rows"] = [case.row for case in self.cases if case.row["variants"] or case.row["failed"]]
        with contextlib.suppress(StopIteration):  # before the row with all neurons is there
            compare(self.result["rows"])
        output.place(by_line.dumps(self.result, ("rows",)), self.path)

    @torch.no_grad()
    def build(self) -> None:
        """Make the weights."""
        for shape in self.shapes.values():
            self.built += [Layers.make(shape, keep, self.timer.device) for keep in KEEPS]
        self.timer.synchronize()
        gc.freeze()  # a capture may collect garbage first, which would look through all that was imported

    def _make(self, layers: Layers, tokens: int, read: float) -> Case:
        shape, routings = layers.shape, Routings.make(layers.shape, tokens, self.timer.device, self.routings)
        active = routings.active()
        size = active * layers.records[0].experts.nbytes
        row = {
            "case": f"{shape.name} M {tokens} keep {layers.keep:g}",
            "model": shape.name,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "experts": shape.experts,
            "picked": shape.picked,
            "tokens": tokens,
            "keep": layers.keep,
            "active": active,
            "bytes": size,
            "read_gb_s": read,
            "floor_us": size / read / 1e3,
            "variants": {},
            "failed": {},
        }
        return Case(layers, tokens, routings, row)

    def _ceiling(self) -> float:
        device, size = self.timer.device, 1 << 18 if self.dry else ceilings.READ_BYTES
        number = 1 if self.dry else torch.cuda.get_device_properties(device).multi_processor_count
        read = ceilings.read_bandwidth(self.timer, size, number)
        self.result["ceilings"] = {"read": read}
        self.result["bandwidth_gb_s"] = read["gb_s"]
        gb_s: float = read["gb_s"]
        return gb_s

    @torch.no_grad()
    def run(self) -> None:
        """Measure everything that time allows."""
        self.until = time.time() + self.budget
        facts = {"machine": machine.facts(), "device": device_facts(self.timer.device)}
        self.result |= {**facts, "clocks": self.timer.clocks()}
        self.write()
        read = self._ceiling()
        self.cases = [self._make(layers, tokens, read) for tokens in self.tokens for layers in self.built]
        self.timer.spin(0.3)
        for case in self.cases:
            if time.time() > self.until:
                self.result["left_out"].append(case.name)
                continue
            for ways in (our_ways, transformers_ways):
                for name, calls, graph in ways(case):
                    prepare(self.timer, case, name, calls, graph)
            sample(self.timer, case, self.rounds)
            if case.tokens == 1:
                self._launched(case)
            self.write()
            print(line(case.row), flush=True)
        for case in self.cases:
            self._configured(case)
        self.result |= {"state": "complete", "clocks_at_the_end": self.timer.clocks()}
        self.write()

    def _launched(self, case: Case) -> None:
        """Times of calls that the host launches."""
        for name, calls, _ in (*our_ways(case), *transformers_ways(case)):
            if name in case.row["variants"]:
                whole, host = self.timer.eager(calls)
                case.row["variants"][name] |= {"eager_us": whole * 1e6, "host_us": host * 1e6}

    def _configured(self, case: Case) -> None:
        """Further configurations of the kernels, with the default once more beside them."""
        found = candidates(case.layers.shape, case.layers.keep, case.tokens, self.timer.device)[: self.configs]
        if time.time() > self.until:
            self.result["left_out"].append(f"{case.name}: configurations")
            return
        for number, config in enumerate(found, 1):
            prepare(self.timer, case, f"triton #{number}", by_config(case, config), True, config)
        sample(self.timer, case, self.rounds)
        self.write()
        own = {n: f"{v['us']:.1f}" for n, v in case.row["variants"].items() if n.startswith("triton") and "us" in v}
        print(f"{case.name}: {own}", flush=True)


def main(given: list[str] | None = None) -> int:
    """Measure, print, write; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Bench experts on a GPU.")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; default: that of the results")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which nothing else is begun")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, to try the bench itself")
    parser.add_argument("--warm", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.dry_run and arguments.out is None:
        parser.error("--dry-run must come with --out: its numbers mean nothing")
    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench.gpu.experts needs a torch that sees an NVIDIA GPU; nothing was measured.")
        return 2
    if arguments.warm is not None:
        warm(arguments.warm, WARMERS)
        return 0
    warmers = []
    if not arguments.dry_run:
        command = [sys.executable, "-m", "bench.gpu.experts", "--warm"]
        warmers = [subprocess.Popen([*command, str(i)], env=stages.environment()) for i in range(WARMERS)]
    bench = Bench(arguments.out or RESULT, arguments.dry_run, arguments.budget)
    bench.build()
    for process in warmers:
        process.wait()
    bench.run()
    print(
        f"read at {bench.result['bandwidth_gb_s']:.0f} GB/s; {bench.result['seconds']:.0f} s; {bench.result['state']}"
    )
    for row in bench.result["rows"]:
        versus = ", ".join(f"{row[key]:.2f}x {key[3:]}" for key in ("vs_dense", "vs_pruned") if key in row)
        print(f"{row['case']}: {versus}; fastest {row.get('fastest')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
