"""FFNs on a CPU against the speed of memory: every way to run one layer, in one process, each ratio from one run.

    python -m bench.cpu.run                                     all cases, then SmolLM2; writes bench/results/cpu*.json
    python -m bench.cpu.run --quick                             two small cases; writes no file without --out
    python -m bench.cpu.run --shapes gpt2 --weights int8 --tokens 1 --no-model

A case is one FFN: shape, dtype, M, keep. Its variants take turns in slices of a tenth of a second at most:

    dense              torch's linear layers over contiguous weights, all neurons
    torch-compact      the same over the kept neurons
    compact, gather    what PrunedMLP calls by backend `auto`: the kept neurons alone, or a random choice among all
    inductor-dense,    the torch functions by torch.compile(mode="max-autotune")
    inductor-compact

With int8 and int4 weights those of `dense` and `torch-compact` are in the dtype of x. Calls rotate over one arena of
weights that exceeds the last-level cache twice where memory allows, so that they come from memory. Memory's own speed
drifts on virtual machines; so a plain read loop takes turns with the variants, and the best of its passes in a case is
the bandwidth that the case is held against. `goals` says what is wanted; the result, what was met.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bench import by_line
from bench.cpu.goals import Row, judge
from bench.shapes import BY_NAME, DEFAULT, Shape
from bench.tables.readme import CPU_HEADER, CPU_MODEL_HEADER, GOAL_HEADER, cpu_cells, cpu_model_cells, goal_cells
from pyprune import KeepIndex, accelerate, prune
from pyprune.base import machine, reference
from pyprune.base.clock import Job, interleave, median, quantiles
from pyprune.base.errors import check, check_choice
from pyprune.base.files import new_file
from pyprune.base.memory import huge_pages
from pyprune.base.record import Record, described
from pyprune.cli.screen import Bars, out, table
from pyprune.ffn import dispatch, first_use, native, operators
from pyprune.ffn.backends import Problem
from pyprune.ffn.quantisation import WEIGHTS, row_bytes
from pyprune.model.loading import load_model
from pyprune.speed import roofline
from pyprune.speed.benchmark import benchmark

RESULTS = Path(__file__).parents[1] / "results"
# The layer of the plot, which has one more keep.
PLOTTED = ("llama-3.2-1b", "bfloat16")
ARENA, QUICK_ARENA = 1 << 30, 1 << 26
READ_BYTES = 256 << 20
ROUNDS = 6

# --- cases


@dataclass(frozen=True)
class Case:
    """One FFN: `dtype` is that of x and of torch's weights, `weights` that of the record."""

    shape: Shape
    dtype: str
    weights: str
    tokens: int
    keep: float

    @property
    def neurons(self) -> int:
        return max(1, round(self.keep * self.shape.intermediate_size))


_FLOAT_POINTS = ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (64, 0.5), (128, 0.5), (512, 0.5))
# (dtype of x, dtype of the record) -> (M, keep)
POINTS: dict[tuple[str, str], tuple[tuple[int, float], ...]] = {
    ("bfloat16", "bfloat16"): _FLOAT_POINTS,
    ("bfloat16", "int8"): ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5)),
    ("bfloat16", "int4"): ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (128, 0.5)),
    ("float32", "float32"): _FLOAT_POINTS,
    ("float16", "float16"): ((1, 1.0), (1, 0.5)),
}


def all_cases() -> list[Case]:
    """Every case, those of one dtype next to each other."""
    cases = []
    for (dtype, weights), points in POINTS.items():
        for name in DEFAULT if dtype != "float16" else PLOTTED[:1]:
            more = ((1, 0.75),) if (name, weights) == PLOTTED else ()
            cases += [Case(BY_NAME[name], dtype, weights, tokens, keep) for tokens, keep in (*points, *more)]
    return cases


QUICK = tuple(Case(BY_NAME["smollm2-135m"], "bfloat16", weights, 1, 0.5) for weights in ("bfloat16", "int8"))


# --- what one case runs


class Arena:
    """Memory that weights of every variant are views of, so that they need no time to make and no room each.

    It holds bfloat16 numbers near 0.02. Two of them read as one float32 are such a number again, every byte is an int8
    one or two of int4, and int4's scales are bfloat16; for float16 it is filled anew.
    """

    def __init__(self, size: int) -> None:
        size = size // 64 * 64
        # As `accelerate` keeps records; so torch's weights lie on huge pages here too, which they seldom do elsewhere.
        pages = huge_pages(size)
        self.memory = torch.empty(size, dtype=torch.uint8) if pages is None else pages
        self.fill(torch.bfloat16)

    def fill(self, dtype: torch.dtype) -> None:
        """Write normal numbers of `dtype` everywhere."""
        self.filled = dtype
        generator = torch.Generator().manual_seed(0)
        sign = torch.randint(2, (1 << 20,), generator=generator) * 2 - 1
        tile = (sign * (0.01 + 0.02 * torch.rand(1 << 20, generator=generator))).to(dtype)
        for part in self.memory.view(dtype).split(len(tile)):
            part.copy_(tile[: len(part)])

    def copies(self, dtype: torch.dtype, *shapes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """As many sets of contiguous matrices of these shapes as there is room for."""
        if (dtype == torch.float16) != (self.filled == torch.float16):
            self.fill(torch.float16 if dtype == torch.float16 else torch.bfloat16)
        sizes = [rows * columns for rows, columns in shapes]
        numbers = self.memory.view(dtype)
        check(len(numbers) >= sum(sizes), "arena", f"hold {sum(sizes)} numbers of {dtype}", len(numbers))
        sets = numbers[: len(numbers) // sum(sizes) * sum(sizes)].view(-1, sum(sizes))
        columns = sets.split(sizes, dim=1)
        views = [c.unflatten(1, shape).unbind() for c, shape in zip(columns, shapes, strict=True)]
        return list(zip(*views, strict=True))


@dataclass
class Variant:
    """A way to run the FFN of a case: `run(*copies[i])` reads copy i of the weights, `bytes` of them."""

    run: Callable[..., Any]
    copies: list[tuple[Any, ...]]
    bytes: int
    backend: str

    def job(self, seconds: float) -> Job:
        """Calls for `seconds`, at least one, each on the next copy; each is a sample."""
        turns = itertools.cycle(self.copies)

        def slices() -> list[float]:
            samples = []
            end = time.perf_counter() + seconds
            while True:
                arguments = next(turns)
                start = time.perf_counter()
                self.run(*arguments)
                stop = time.perf_counter()
                samples.append(stop - start)
                if stop >= end:
                    return samples

        return slices


def _biases(count: int, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool) -> list[Any]:
    if not wanted:
        return [None] * count
    return list((torch.randn(count, *shape) * 0.01).to(dtype).unbind())


def torch_ffn(shape: Shape) -> Callable[..., Tensor]:
    """The FFN as a function of x, weights and biases, as torch's linear layers compute it."""
    act = reference.ACTIVATIONS[shape.activation]

    def plain(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, up, up_bias)), down, down_bias)

    def gated(
        x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gate_bias: Tensor, up_bias: Tensor, down_bias: Tensor
    ) -> Tensor:
        return F.linear(act(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)

    return gated if shape.gated else plain


def _bytes(case: Case, neurons: int, dtype: torch.dtype, gather: bool = False) -> int:
    shape, weights = case.shape, None if dtype == WEIGHTS[case.dtype] else dtype
    form: dict[str, Any] = {"gated": shape.gated, "activation": shape.activation, "dtype": WEIGHTS[case.dtype]}
    biases = {"neuron_bias": shape.bias, "down_bias": shape.bias}
    kept = neurons if gather else None
    return described(shape.hidden_size, neurons, **form, **biases, weights=weights, kept=kept).nbytes


def torch_variant(case: Case, arena: Arena, x: Tensor, neurons: int) -> Variant:
    """Torch's linear layers over `neurons` neurons."""
    d, inputs = case.shape.hidden_size, 2 if case.shape.gated else 1
    weights = arena.copies(x.dtype, *[(neurons, d)] * inputs, (d, neurons))
    biases = [_biases(len(weights), (neurons,), x.dtype, case.shape.bias) for _ in range(inputs)]
    biases.append(_biases(len(weights), (d,), x.dtype, case.shape.bias))
    copies = [(x, *w, *b) for w, *b in zip(weights, *biases, strict=True)]
    return Variant(torch_ffn(case.shape), copies, _bytes(case, neurons, x.dtype), "torch")


def pruned_variant(case: Case, arena: Arena, x: Tensor, gather: bool) -> Variant:
    """The call that PrunedMLP makes, compact or gather."""
    shape, dtype = case.shape, WEIGHTS[case.weights]
    d, parts = shape.hidden_size, 3 if shape.gated else 2
    rows = shape.intermediate_size if gather else case.neurons
    index = None
    if gather:
        scores = torch.rand(rows, generator=torch.Generator().manual_seed(0))
        index = KeepIndex.from_scores(scores, case.neurons).neurons
    records = arena.copies(dtype, (rows, row_bytes(parts, d, dtype) // dtype.itemsize))
    scales: list[Any] = [None] * len(records)
    if dtype == torch.int8:
        scales = list(torch.full((len(records), rows, parts), 1e-4).unbind())
    neuron_bias = _biases(len(records), (rows, parts - 1), x.dtype, shape.bias)
    down_bias = _biases(len(records), (d,), x.dtype, shape.bias)
    form = (shape.gated, shape.activation)
    given = [
        Record(rows, *form, scale, bias, last, index)
        for (rows,), scale, bias, last in zip(records, scales, neuron_bias, down_bias, strict=True)
    ]
    problem = Problem.of(given[0], x.dtype, case.tokens)
    first_use.measure([problem])
    most = dispatch.native_tokens(x.dtype, dtype, d, gather, "cpu", case.neurons, *form)
    copies = [operators.arguments(x, record, "auto", most) for record in given]
    size = _bytes(case, case.neurons, dtype, gather)
    return Variant(operators.FFN, copies, size, dispatch.choose(problem).backend.NAME)


class Compiler:
    """torch.compile, until its time is up; says what it left out."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.left = seconds, seconds
        self.skipped: list[str] = []
        self._functions: dict[str, Callable[..., Any]] = {}
        torch._dynamo.config.recompile_limit = 64
        # The workers of a pool would take cores from what is timed.
        torch._inductor.config.compile_threads = 1

    def variant(self, case: Case, eager: Variant, what: str) -> Variant | None:
        """`eager` compiled, or None when there is no time."""
        if self.left <= 0:
            self.skipped.append(f"{case.shape.name} {what}")
            return None
        start = time.perf_counter()
        run = self._functions.setdefault(
            case.shape.name, torch.compile(torch_ffn(case.shape), mode="max-autotune", dynamic=False)
        )
        run(*eager.copies[0])
        self.left -= time.perf_counter() - start
        return Variant(run, eager.copies, eager.bytes, "inductor")


def variants(case: Case, arena: Arena, compiler: Compiler | None) -> dict[str, Variant]:
    """Every way to run a case, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, case.tokens, case.shape.hidden_size, generator=generator).to(WEIGHTS[case.dtype])
    found = {"dense": torch_variant(case, arena, x, case.shape.intermediate_size)}
    pruned = case.neurons < case.shape.intermediate_size
    if pruned:
        found["torch-compact"] = torch_variant(case, arena, x, case.neurons)
    found["compact"] = pruned_variant(case, arena, x, gather=False)
    if pruned:
        found["gather"] = pruned_variant(case, arena, x, gather=True)
    if compiler and (case.weights, case.tokens) == ("bfloat16", 1) and case.keep in (1.0, 0.5):
        for name in ("dense", "torch-compact") if pruned else ("dense",):
            inductor = f"inductor-{name.removeprefix('torch-')}"
            compiled = compiler.variant(case, found[name], inductor)
            if compiled:
                found[inductor] = compiled
    return found


# --- measuring


class Reader:
    """Plain read loops over buffers that no cache holds: the loop that was found best and the native one, on pages of
    4 KB and on huge pages. The fastest of them by the median of its passes is the ceiling.
    """

    def __init__(self, loop: str, size: int) -> None:
        self.bytes = size // (4 * 4096) * 4 * 4096
        pages = huge_pages(self.bytes)
        # Two, so that a cache of one buffer's size is of no help.
        buffers = [
            torch.empty(self.bytes // 4),
            torch.empty(self.bytes // 4) if pages is None else pages.view(torch.float32),
        ]
        loops = [roofline.read_loops(buffer.fill_(1.0).view(-1, 4096)) for buffer in buffers]
        names = [name for name in dict.fromkeys((loop, "native")) if name in loops[0]]
        self._passes = [(name, found[name]) for name in names for found in loops]

    def job(self) -> list[float]:
        """A pass of each loop over each buffer."""
        samples = []
        for _, run in self._passes:
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return samples

    def facts(self, samples: list[float]) -> dict[str, Any]:
        kinds = len(self._passes)
        medians = [median(samples[i::kinds]) for i in range(kinds)]
        best = min(range(kinds), key=medians.__getitem__)
        return {
            "gb_s": self.bytes / medians[best] / 1e9,
            "best_gb_s": self.bytes / min(samples) / 1e9,
            "loop": self._passes[best][0],
            "passes": len(samples) // kinds,
            "buffer_bytes": self.bytes,
        }


def _variant_facts(variant: Variant, samples: list[float], read_gb_s: float) -> dict[str, Any]:
    us = quantiles(samples, 1e6)
    gb_s = variant.bytes / us["p50"] / 1e3
    return {
        "us": us["p50"],
        "us_quantiles": us,
        "samples": len(samples),
        "backend": variant.backend,
        "bytes": variant.bytes,
        "copies": len(variant.copies),
        "gb_s": gb_s,
        "share_of_bandwidth": gb_s / read_gb_s,
    }


def measure(case: Case, arena: Arena, reader: Reader, seconds: float, compiler: Compiler | None = None) -> Row:
    """One case: every variant, about `seconds` each, in turns with the reader."""
    found = variants(case, arena, compiler)
    jobs: dict[str, Job] = {name: variant.job(seconds / ROUNDS) for name, variant in found.items()}
    samples = interleave({**jobs, "read": reader.job}, ROUNDS)
    read = reader.facts(samples["read"])
    facts = {name: _variant_facts(v, samples[name], read["gb_s"]) for name, v in found.items()}
    for entry in facts.values():
        entry["vs_dense"] = facts["dense"]["us"] / entry["us"]
        entry["vs_torch_compact"] = facts.get("torch-compact", facts["dense"])["us"] / entry["us"]
    return {
        "model": case.shape.name,
        "hidden_size": case.shape.hidden_size,
        "intermediate_size": case.shape.intermediate_size,
        "gated": case.shape.gated,
        "dtype": case.dtype,
        "weights": case.weights,
        "tokens": case.tokens,
        "keep": case.neurons / case.shape.intermediate_size,
        "read": read,
        "ceiling_us": found["compact"].bytes / read["gb_s"] / 1e3,
        "variants": facts,
    }


def measure_model(name: str, progress: Callable[[str, int, int], None]) -> tuple[list[Row], dict[str, Any]]:
    """Decode of a whole model at batch 1, stock against accelerated at keep 0.5: a row for each, and the report."""
    dense = load_model(name, "bfloat16", "cpu")
    narrow = copy.deepcopy(dense)
    mask = prune(narrow, 0.5, "random", repair=None).mask
    candidates = {
        weights or "bfloat16": accelerate(copy.deepcopy(dense), mask=mask, weights=weights)
        for weights in (None, "int8", "int4")
    }
    report = benchmark(
        dense, candidates, batches=(1,), new_tokens=32, prefill_tokens=64, repeats=6, progress=progress
    ).to_json()
    share, stock = report["share"]["decode"]["1"], report["models"]["dense"]["decode"]["1"]
    rows = []
    for weights in candidates:
        entry = report["models"][weights]
        value = entry["decode"]["1"]
        rows.append(
            {
                "model": name,
                "weights": weights,
                "keep": entry["keep"],
                "ffn_share": share,
                "dense_tokens_per_s": stock["tokens_per_s"],
                "tokens_per_s": value["tokens_per_s"],
                **{key: value[key] for key in ("ratio", "ceiling", "share_of_ceiling")},
            }
        )
    return rows, report


def choose(shapes: str, weights: str, tokens: str) -> list[Case]:
    """The cases whose shape, weights and M are listed; an empty list means all."""
    wanted = [[v for v in text.split(",") if v] for text in (shapes, weights, tokens)]
    known = (DEFAULT, tuple(w for _, w in POINTS), tuple(str(c.tokens) for c in all_cases()))
    for values, option, allowed in zip(wanted, ("shapes", "weights", "tokens"), known, strict=True):
        for value in values:
            check_choice(value, option, tuple(dict.fromkeys(allowed)))
    names, dtypes, counts = (values or list(allowed) for values, allowed in zip(wanted, known, strict=True))
    return [c for c in all_cases() if c.shape.name in names and c.weights in dtypes and str(c.tokens) in counts]


def run(cases: list[Case], arena_bytes: int, seconds: float, compile_seconds: float) -> dict[str, Any]:
    """Measure the cases; the result without the whole model and the goals."""
    facts: dict[str, Any] = {"suite": "cpu", "machine": machine.facts()}
    library = native.facts()
    facts["native"] = {key: library[key] for key in library if key != "path"}
    start = roofline.read_bandwidth("cpu")
    arena = Arena(min(arena_bytes, roofline.free_memory("cpu") // 4))
    reader = Reader(start.loop, min(READ_BYTES, roofline.buffer_bytes("cpu")))
    compiler = Compiler(compile_seconds) if compile_seconds > 0 else None
    with torch.no_grad(), Bars() as bars:
        rows = []
        for i, case in enumerate(cases):
            bars("timing FFNs", i, len(cases))
            rows.append(measure(case, arena, reader, seconds, compiler))
    facts["settings"] = {
        "rounds": ROUNDS,
        "seconds": seconds,
        "arena_bytes": len(arena.memory),
        "huge_pages": _huge_pages(),
        "compile_seconds": compiler.seconds - compiler.left if compiler else 0.0,
        "not_compiled": compiler.skipped if compiler else [],
    }
    del arena, reader
    end = roofline.read_bandwidth("cpu")
    return {
        **facts,
        "bandwidth_gb_s": start.gb_s,
        "bandwidth": start.to_json(),
        "bandwidth_end": end.to_json(),
        "rows": rows,
    }


def _huge_pages() -> dict[str, str | None]:
    """What decides whether weights lie on huge pages: the kernel's choice (in brackets), and torch's variable."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "kernel": file.read_text().strip() if file.is_file() else None,
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
    }


def result_file(cpu: str, isa: str) -> Path:
    """Where a whole run on such a CPU goes; `isa` is that which is forced, or empty."""
    brand, _, numbers = cpu.lower().partition(" (family ")
    words = [word for word in re.findall(r"[a-z][a-z0-9-]*", brand) if word != "amd"]
    # Intel's generations differ by what they can do, and have one file; AMD's share a brand.
    kind = [] if words[:1] == ["intel"] else [*words[:1], *re.findall(r"^\d+", numbers)]
    return RESULTS / f"{'-'.join(['cpu', *kind, *([isa] if isa else [])])}.json"


def _arena_bytes() -> int:
    return max(ARENA, 2 * roofline.last_level_cache())


def tables(result: dict[str, Any]) -> Iterator[Any]:
    """What the terminal shows."""
    header = [name.replace(" ", "\n") for name in CPU_HEADER]
    yield table("one FFN, medians in us", header, map(cpu_cells, result["rows"]))
    if result["models"]:
        yield table("whole model, decode at batch 1, medians", CPU_MODEL_HEADER, map(cpu_model_cells, result["models"]))
    yield table("goals", GOAL_HEADER, map(goal_cells, result["goals"]))
    reads = [result[key] for key in ("bandwidth", "bandwidth_end")]
    words = " at the start, ".join(f"{read['gb_s']:.1f} GB/s ({read['loop']})" for read in reads)
    yield f"memory read at {words} at the end; {result['seconds']:.0f} s in all."
    if result["settings"]["arena_bytes"] < 2 * roofline.last_level_cache():
        yield "The arena may lie in the cache in part: rates may exceed those of memory."


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two small cases, no model, nothing compiled.")] = False,
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(DEFAULT)}, by commas; default: all.")] = "",
    weights: Annotated[str, typer.Option(help="bfloat16, int8, int4, float32, float16, by commas; default: all.")] = "",
    tokens: Annotated[str, typer.Option(help="Values of M, by commas; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="To spend on each variant of a case.")] = 0.3,
    compile_seconds: Annotated[float, typer.Option(help="No compilation starts after as many; 0: none does.")] = 60,
    model: Annotated[str, typer.Option(help="MODEL to decode with.")] = "demo",
    no_model: Annotated[bool, typer.Option("--no-model", help="FFNs alone.")] = False,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="The JSON file; default: of a whole run that of the results, else none."),
    ] = None,
) -> None:
    """Measure, print, write."""
    start = time.perf_counter()
    if quick:
        result = run(list(QUICK), QUICK_ARENA, min(seconds, 0.05), 0)
    else:
        result = run(choose(shapes, weights, tokens), _arena_bytes(), seconds, compile_seconds)
    result |= {"models": [], "model_report": None}
    if not (quick or no_model):
        with Bars() as bars:
            result["models"], result["model_report"] = measure_model(model, bars)
    result |= {"goals": judge(result), "seconds": time.perf_counter() - start}
    whole = not (quick or no_model or shapes or weights or tokens)
    own = result_file(machine.cpu_name(), os.environ.get("PYPRUNE_CPU_ISA", ""))
    if path := out_file or (own if whole else None):
        with new_file(path) as temporary:
            temporary.write_text(by_line.dumps(result, ("rows", "models", "goals")), encoding="utf-8")
    # Into a pipe rich would fold the columns at 80.
    out.width = max(out.width, 175)
    for item in tables(result):
        out.print(item, highlight=False)


if __name__ == "__main__":
    typer.run(main)
