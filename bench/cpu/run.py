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

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import by_line
from bench.cpu.cases import QUICK, Case, choose
from bench.cpu.goals import judge
from bench.cpu.measure import READ_BYTES, ROUNDS, Reader, measure, measure_model
from bench.cpu.variants import Arena, Compiler
from bench.shapes import DEFAULT
from bench.tables.readme import CPU_HEADER, CPU_MODEL_HEADER, GOAL_HEADER, cpu_cells, cpu_model_cells, goal_cells
from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.cli.screen import Bars, out, table
from pyprune.ffn import native
from pyprune.speed import roofline

RESULTS = Path(__file__).parents[1] / "results"
ARENA, QUICK_ARENA = 1 << 30, 1 << 26


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
