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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from torch import Tensor

from bench import by_line
from bench.gpu import ceilings, output, stages
from bench.gpu.case import FLOOR, WORSE, WrongResult, error
from bench.gpu.clocks import device_facts
from bench.gpu.timing import Call, CudaTimer, Replay, Timer, WallTimer
from bench.mixtures import OTHERS, OWN, SHAPES, Shape
from pyprune.base import machine, reference
from pyprune.base.clock import quantiles
from pyprune.ffn.moe import PrunedMoE
from pyprune.ffn.moe_operator import BACKENDS
from pyprune.model.experts import find_bank
from pyprune.model.mask import KeepIndex

RESULT = Path(__file__).parents[1] / "results" / "experts-gpu.json"
TOKENS = (1, 4, 16, 256)
KEEPS = (1.0, 0.5)
ROUTINGS, ROUNDS, PER_ROUND = 16, 4, 3
FEW = 16  # most tokens for the CUDA kernels, which many would read the weights again
COPYING = 16  # most tokens for batched_mm, which copies the weights of every pair
WARMERS = 8
# A path that rounds elsewhere than torch's is still the same function.
CLOSE = 3e-2
WAITS = "it waits for the device, so that no graph holds it"


@dataclass
class Layers:
    """A mixture with so many neurons kept: two layers, as Transformers has them and as PrunedMoE."""

    shape: Shape
    keep: float
    own: list[Any]
    records: list[PrunedMoE]
    gathers: list[PrunedMoE] = field(default_factory=list)  # as many neurons of records that have all

    @classmethod
    def make(cls, shape: Shape, keep: float, device: torch.device) -> Layers:
        own = [cls._module(shape, keep, device) for _ in range(shape.layers)]
        found = cls(shape, keep, own, [cls._record(shape, module) for module in own])
        if keep < 1:
            generator = torch.Generator().manual_seed(0)
            size, count = shape.intermediate_size, round(keep * shape.intermediate_size)
            for _ in own:
                record = cls._record(shape, cls._module(shape, 1.0, device))
                scores = torch.rand(shape.experts, size, generator=generator)
                record.set_keep([KeepIndex.from_scores(one, count) for one in scores])
                found.gathers.append(record)
        return found

    @staticmethod
    def _module(shape: Shape, keep: float, device: torch.device) -> Any:
        module = shape.empty(keep, device)
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
        return module

    @staticmethod
    def _record(shape: Shape, module: Any) -> PrunedMoE:
        bank = find_bank(shape.name, module)
        assert bank is not None
        return PrunedMoE.from_bank(bank, backend="triton", picked=shape.picked)


@dataclass
class Routings:
    """Operands of several steps: `[M, D]` hidden states, and for each token other random experts."""

    x: list[Tensor]
    index: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def make(cls, shape: Shape, tokens: int, device: torch.device, count: int = ROUTINGS) -> Routings:
        generator = torch.Generator(device).manual_seed(tokens)
        found = cls([], [], [])
        for _ in range(count):
            scores = torch.rand(tokens, shape.experts, device=device, generator=generator)
            found.x.append(torch.randn(tokens, shape.hidden_size, device=device, generator=generator).bfloat16())
            found.index.append(scores.argsort(1)[:, : shape.picked].contiguous())
            found.weights.append(torch.full((tokens, shape.picked), 1 / shape.picked, device=device).bfloat16())
        return found

    def calls(self, run: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> list[Call]:
        """`run(i, x, index, weights)` for each step."""
        given = zip(self.x, self.index, self.weights, strict=True)
        return [lambda i=i, a=arguments: run(i, *a) for i, arguments in enumerate(given)]

    def active(self) -> float:
        """Experts that a step names, on average."""
        return sum(len(index.unique()) for index in self.index) / len(self.index)


@dataclass
class Case:
    """One case as it is measured."""

    layers: Layers
    tokens: int
    routings: Routings
    row: dict[str, Any]
    replays: dict[str, Replay] = field(default_factory=dict)
    _truth: dict[bool, tuple[Tensor, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.layers.shape.name} M {self.tokens} keep {self.layers.keep:g}"

    def truth(self, gather: bool = False) -> tuple[Tensor, float]:
        """The first call in float64, and torch's own error."""
        if gather not in self._truth:
            records = self.layers.gathers if gather else self.layers.records
            experts, given = records[0].experts, self.routings
            x, index, weights = given.x[0], given.index[0], given.weights[0]
            exact = reference.moe(x.double(), experts, index, weights.double())
            self._truth[gather] = exact, error(reference.moe(x, experts, index, weights), exact)
        return self._truth[gather]


def transformers_ways(case: Case) -> Iterator[tuple[str, list[Call], bool]]:
    """Name, calls and whether a graph may hold them, of Transformers' implementations over the case's weights."""
    own, prefix = case.layers.own, "" if case.layers.keep == 1 else "pruned "
    for name in (OWN, *OTHERS):
        if name == "batched_mm" and case.tokens > COPYING:
            continue

        def run(i: int, x: Tensor, index: Tensor, weights: Tensor, name: str = name) -> Tensor:
            module = own[i % len(own)]
            module.config._experts_implementation = name
            out: Tensor = module(x, index, weights)
            return out

        yield prefix + name, case.routings.calls(run), name != "eager"


def our_ways(case: Case) -> Iterator[tuple[str, list[Call], bool]]:
    """The same of PrunedMoE."""
    cuda = ("cuda",) if case.routings.x[0].is_cuda and case.tokens <= FEW else ()
    for name in ("triton", "torch", *cuda, *(f"{own} gather" for own in ("triton", *cuda) if case.layers.gathers)):

        def run(i: int, x: Tensor, index: Tensor, weights: Tensor, name: str = name) -> Tensor:
            records = case.layers.gathers if name.endswith("gather") else case.layers.records
            module = records[i % len(records)]
            module.backend = name.partition(" ")[0]
            out: Tensor = module(x, index, weights)
            return out

        yield name, case.routings.calls(run), name != "torch"


def candidates(shape: Shape, keep: float, tokens: int, device: torch.device) -> list[Any]:
    """Configurations of the kernels, the analytic one first."""
    from pyprune import triton_kernels as kernels

    width = round(keep * shape.intermediate_size)
    sizes = (tokens, shape.picked, shape.experts, width, shape.hidden_size)
    place = kernels.architecture(device)
    found: list[Any] = kernels.experts_candidates(*sizes, torch.bfloat16, True, True, place)
    return found


def by_config(case: Case, config: Any) -> list[Call]:
    """PrunedMoE's kernels by one of their configurations, past the operator."""
    from pyprune import triton_kernels as kernels

    records = [module.experts for module in case.layers.records]

    def run(i: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        e = records[i % len(records)]
        out: Tensor = kernels.moe(x, e.rows, index, weights, gated=True, activation=e.activation, config=config)
        return out

    return case.routings.calls(run)


def described(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:400]


def prepare(timer: Timer, case: Case, name: str, calls: list[Call], graph: bool, config: Any = None) -> None:
    """Check a variant and make ready what is timed of it; what fails is recorded and costs nothing else."""
    from pyprune import triton_kernels as kernels

    ours = name.partition(" ")[0] in BACKENDS
    try:
        exact, torchs = case.truth(name.endswith("gather"))
        found = error(calls[0](), exact)
        limit = max(WORSE * torchs, FLOOR) if ours else max(WORSE * torchs, CLOSE)
        if found > limit:
            raise WrongResult(f"wrong result: error {found:.3g} where torch has {torchs:.3g}")
        facts: dict[str, Any] = {"captured": graph, "error": found, "torch_error": torchs}
        if graph:
            try:
                replay = timer.capture(calls)
                replay.run()
                timer.synchronize()
                if ours and not torch.equal(replay.first, calls[0]()):
                    raise WrongResult("a replay of the CUDA graph differs from the call")
            except WrongResult:
                raise
            except Exception as problem:  # then as the host launches it
                facts |= {"captured": False, "why_not_captured": described(problem)}
                with contextlib.suppress(Exception):
                    timer.synchronize()
        else:
            facts["why_not_captured"] = WAITS
        if not facts["captured"]:
            few = calls[:4]
            replay = Replay(lambda: [call() for call in few], len(few), *(few[0](), few[-1]()))
        if config is not None:
            facts["config"] = kernels.to_json(config)
        case.row["variants"][name], case.replays[name] = facts, replay
    except Exception as problem:
        case.row["failed"][name] = described(problem)
        timer.synchronize()  # raises where the device itself is lost


def sample(timer: Timer, case: Case, rounds: int) -> None:
    """Time the variants that are ready, in turns, and forget their graphs."""
    samples: dict[str, list[float]] = {name: [] for name in case.replays}
    for i in range(rounds + 1):
        for name, replay in case.replays.items():
            few = not case.row["variants"][name]["captured"]
            found = timer.sample(replay, 1 if few or not i else PER_ROUND)
            samples[name] += found if i else []
    size, read = case.row["bytes"], case.row["read_gb_s"]
    for name, found in samples.items():
        facts = case.row["variants"][name]
        us = quantiles(found, 1e6)
        gb_s = size / us["p50"] / 1e3
        facts |= {"us": us["p50"], "us_quantiles": us, "gb_s": gb_s, "share_of_read": gb_s / read}
    case.replays.clear()
    gc.collect()


def fastest(variants: dict[str, Any], names: Callable[[str], bool]) -> tuple[str, float] | None:
    """The one with the smallest median among those names."""
    found = [(facts["us"], name) for name, facts in variants.items() if names(name) and "us" in facts]
    return (min(found)[1], min(found)[0]) if found else None


def compare(rows: list[dict[str, Any]]) -> None:
    """Put into each row the fastest of Transformers' ways, with all neurons and pruned, and our ratios over them."""
    for row in rows:
        full = next(r for r in rows if (r["model"], r["tokens"], r["keep"]) == (row["model"], row["tokens"], 1.0))
        ways = {
            "dense": fastest(full["variants"], lambda n: n in (OWN, *OTHERS)),
            "pruned": fastest(row["variants"], lambda n: n.startswith("pruned ")),
            "default": fastest(row["variants"], lambda n: n == "triton"),
            "best": fastest(row["variants"], lambda n: n.startswith("triton") and not n.endswith("gather")),
        }
        row["fastest"] = {key: {"by": way[0], "us": way[1]} for key, way in ways.items() if way}
        if ways["default"]:
            for key in ("dense", "pruned"):
                if way := ways[key]:
                    row[f"vs_{key}"] = way[1] / ways["default"][1]


def line(row: dict[str, Any]) -> str:
    """What the terminal shows of a row."""
    variants = {name: f"{facts['us']:.1f}" for name, facts in row["variants"].items() if "us" in facts}
    default = row["variants"].get("triton", {})
    share = f", {default['share_of_read']:.0%} of read" if "share_of_read" in default else ""
    failed = "".join(f"; {name}: {why[:120]}" for name, why in row["failed"].items())
    times = ", ".join(f"{name} {us}" for name, us in variants.items())
    return f"{row['case']}: floor {row['floor_us']:.1f} us; {times}{share}{failed}"


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
