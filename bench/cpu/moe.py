"""Experts of mixtures at decode: PrunedMoE against Transformers' own paths in one process, each ratio from one run.

    python -m bench.cpu.moe                      all cases; writes bench/results/moe.json (about 4 minutes, 8 GB)
    python -m bench.cpu.moe --shapes olmoe-1b-7b --tokens 1,4 --out FILE

A case is a shape and a number of tokens M. The experts alone run, in bfloat16, with random weights, in several layers,
so that no cache holds what the next call reads. Every token goes to other random experts. The variants take turns, in
slices of a tenth of a second or one call:

    grouped_mm, eager, batched_mm   Transformers' own module by each of its implementations (the last for few tokens,
                                    for it copies the weights of every pair), all neurons
    pruned                          by the implementation that Transformers takes by itself, over the kept neurons
    PrunedMoE                       as `accelerate` makes it (on huge pages), over the kept neurons, for every keep

A plain read loop over memory takes turns with them; a share of bandwidth is that of the bytes of the experts that a
call names, read once. Goals: at keep 1 at least 1.5 times as fast as the fastest of Transformers' ways, and with half
of the neurons 0.9 / keep times as fast as with all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import by_line
from bench.cpu.measure import READ_BYTES, ROUNDS, Reader
from bench.mixtures import OTHERS, OWN, SHAPES, Shape
from bench.tables.moe import GOAL, HEADER, PRUNED_GOAL, cells
from pyprune.base import machine
from pyprune.base.clock import Job, interleave, quantiles
from pyprune.base.errors import check_choice
from pyprune.base.files import new_file
from pyprune.base.memory import Room
from pyprune.cli.screen import Bars, out, table
from pyprune.ffn import moe_choice, native
from pyprune.ffn.moe import PrunedMoE
from pyprune.model.experts import find_bank
from pyprune.speed import roofline

RESULT = Path(__file__).parents[1] / "results" / "moe.json"
KEEPS = (1.0, 0.5)
# Steps of decoding, and one prompt, which is only reported.
TOKENS = (1, 4, 16, 256)
_ROUTINGS = 16
_COPYING = 4  # most tokens for batched_mm


@torch.no_grad()
def layers(shape: Shape, keep: float) -> tuple[list[Any], list[PrunedMoE]]:
    """Modules of random weights, as Transformers has them, and as `accelerate`, which measures, makes them of those."""
    own = []
    generator = torch.Generator().manual_seed(0)
    tile = (torch.randn(1 << 20, generator=generator) * 0.02).bfloat16()
    for _ in range(shape.layers):
        module = shape.empty(keep, "cpu")
        for parameter in module.parameters():
            for part in parameter.view(-1).split(len(tile)):
                part.copy_(tile[: len(part)])
        own.append(module)
    banks = [bank for i, module in enumerate(own) if (bank := find_bank(f"{shape.name}.{i}", module))]
    trial = PrunedMoE.from_bank(banks[0], picked=shape.picked)
    moe_choice.measure(trial.experts, own[0], torch.bfloat16, shape.picked)
    del trial
    room = Room(sum(Room.rounded(sum(p.nbytes for p in module.parameters())) for module in own))
    return own, [PrunedMoE.from_bank(bank, room=room, picked=shape.picked) for bank in banks]


Call = tuple[Tensor, Tensor, Tensor]


def calls(shape: Shape, tokens: int) -> list[Call]:
    """Hidden states, experts and weights of several steps, each with a routing of its own."""
    generator = torch.Generator().manual_seed(tokens)
    found = []
    for _ in range(_ROUTINGS):
        x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
        index = torch.rand(tokens, shape.experts, generator=generator).argsort(1)[:, : shape.picked].contiguous()
        found.append((x, index, torch.full((tokens, shape.picked), 1 / shape.picked).bfloat16()))
    return found


def job(modules: list[Any], given: list[Call], seconds: float, before: Callable[[Any], None] | None = None) -> Job:
    """Calls for `seconds`, at least one, each of the next layer with the next routing; each is a sample."""
    turns = zip(itertools.cycle(modules), itertools.cycle(given), strict=False)

    def slices() -> list[float]:
        for module in modules if before else ():
            assert before is not None
            before(module)
        samples = []
        end = time.perf_counter() + seconds
        while True:
            module, arguments = next(turns)
            start = time.perf_counter()
            module(*arguments)
            stop = time.perf_counter()
            samples.append(stop - start)
            if stop >= end:
                return samples

    return slices


def _by(implementation: str) -> Callable[[Any], None]:
    def choose(module: Any) -> None:
        module.config._experts_implementation = implementation

    return choose


@torch.no_grad()
def measure(
    shape: Shape, built: dict[float, tuple[list[Any], list[PrunedMoE]]], tokens: int, reader: Reader, seconds: float
) -> list[dict[str, Any]]:
    """One case: a row for each keep."""
    given = calls(shape, tokens)
    share = seconds / ROUNDS
    jobs: dict[str, Job] = {"read": reader.job}
    for name in (OWN, *(n for n in OTHERS if n != "batched_mm" or tokens <= _COPYING)):
        jobs[name] = job(built[1.0][0], given, share, _by(name))
    for keep, (own, records) in built.items():
        jobs[f"PrunedMoE {keep}"] = job(records, given, share)
        if keep < 1:
            jobs[f"pruned {keep}"] = job(own, given, share)
    samples = interleave(jobs, ROUNDS)
    read = reader.facts(samples.pop("read"))
    us = {name: quantiles(found, 1e6) for name, found in samples.items()}
    ways = {name: facts for name, facts in us.items() if name == OWN or name in OTHERS}
    best = min(ways, key=lambda name: ways[name]["p50"])
    active = sum(len(index.unique()) for _, index, _ in given) / len(given)
    rows = []
    for keep, (_, records) in built.items():
        mine = us[f"PrunedMoE {keep}"]
        size = active * records[0].experts.nbytes
        gb_s = size / mine["p50"] / 1e3
        backend = "cpu" if tokens * shape.picked <= records[0].native_pairs else "torch"
        rows.append(
            {
                "model": shape.name,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "experts": shape.experts,
                "picked": shape.picked,
                "tokens": tokens,
                "keep": keep,
                "active": active,
                "read": read,
                "transformers": {"by": best, "us": ways[best]["p50"], "ways": ways},
                "transformers_pruned": us.get(f"pruned {keep}"),
                "pruned_moe": {"us": mine["p50"], "us_quantiles": mine, "backend": backend, "bytes": size},
                "gb_s": gb_s,
                "share_of_bandwidth": gb_s / read["gb_s"],
                "vs_transformers": ways[best]["p50"] / mine["p50"],
                "vs_keep_1": us["PrunedMoE 1.0"]["p50"] / mine["p50"],
            }
        )
    return rows


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both goals over the steps of decoding: what was worst, and whether it was met."""
    found = []
    for name, limit, key, full in (GOAL, PRUNED_GOAL):
        values = [
            (row[key] * (1.0 if full else row["keep"]), f"{row['model']} M {row['tokens']} keep {row['keep']:g}")
            for row in rows
            if (row["keep"] == 1) == full and row["tokens"] <= 16
        ]
        if values:
            worst, at = min(values)
            found.append({"goal": name, "limit": limit, "worst": worst, "at": at, "met": worst >= limit})
    return found


def run(shapes: list[Shape], tokens: list[int], seconds: float) -> dict[str, Any]:
    """Measure the shapes."""
    start = time.perf_counter()
    library = native.facts()
    facts: dict[str, Any] = {"suite": "moe", "machine": machine.facts()}
    facts["native"] = {key: library[key] for key in library if key != "path"}
    bandwidth = roofline.read_bandwidth("cpu")
    reader = Reader(bandwidth.loop, min(READ_BYTES, roofline.buffer_bytes("cpu")))
    rows: list[dict[str, Any]] = []
    with Bars() as bars:
        for i, shape in enumerate(shapes):
            bars("timing experts", i, len(shapes))
            built = {keep: layers(shape, keep) for keep in KEEPS}
            for number in tokens:
                rows += measure(shape, built, number, reader, seconds)
            del built  # before the next shape's weights are made
    settings = {"rounds": ROUNDS, "seconds": seconds, "layers": [s.layers for s in shapes], "dtype": "bfloat16"}
    return {
        **facts,
        "bandwidth_gb_s": bandwidth.gb_s,
        "settings": settings,
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "goals": judge(rows),
    }


def tables(result: dict[str, Any]) -> Iterator[Any]:
    """What the terminal shows."""
    yield table(
        "experts of one layer, medians in us", [n.replace(" ", "\n") for n in HEADER], map(cells, result["rows"])
    )
    for goal in result["goals"]:
        yield f"{goal['goal']}: {'met' if goal['met'] else 'not met'}, worst {goal['worst']:.2f} at {goal['at']}"
    yield f"memory read at {result['bandwidth_gb_s']:.1f} GB/s; {result['seconds']:.0f} s in all."


def main(
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}, by commas; default: all.")] = "",
    tokens: Annotated[str, typer.Option(help="Values of M, by commas; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="To spend on each variant of a case.")] = 0.6,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="The JSON file; default: of a whole run that of the results, else none."),
    ] = None,
) -> None:
    """Measure, print, write."""
    names = [name for name in shapes.split(",") if name] or list(SHAPES)
    numbers = [number for number in tokens.split(",") if number] or [str(number) for number in TOKENS]
    for value, option, allowed in ((names, "shapes", SHAPES), (numbers, "tokens", [str(t) for t in TOKENS])):
        for one in value:
            check_choice(one, option, allowed)
    result = run([SHAPES[name] for name in names], [int(number) for number in numbers], seconds)
    if path := out_file or (None if shapes or tokens else RESULT):
        with new_file(path) as temporary:
            temporary.write_text(by_line.dumps(result, ("rows", "goals")), encoding="utf-8")
    out.width = max(out.width, 175)
    for item in tables(result):
        out.print(item, highlight=False)


if __name__ == "__main__":
    typer.run(main)
