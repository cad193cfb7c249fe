"""Perplexity after pruning, method by method: calibrate on one half of a text, evaluate on the other.

    python bench/bench_quality.py --text FILE --calibrate FILE --calibrate default --name quality

Every row is measured in one run on one machine; the JSON goes to bench/results/NAME.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pyprune import PruneConfig, machine, prune
from pyprune.evaluation import perplexity
from pyprune.files import new_file
from pyprune.loading import DEMO, load_model, load_tokenizer
from pyprune.screen import Bars, show, table
from pyprune.text import load_text, token_windows

# (method, compensation): what a reader would compare first
ROWS = (
    ("random", "none"),
    ("random", "least-squares"),
    ("magnitude-l2-both", "none"),
    ("activation", "none"),
    ("wanda", "none"),
    ("wanda", "bias"),
    ("wanda", "least-squares"),
    ("flap", "bias"),
    ("flap", "least-squares"),
)
RESULTS = Path(__file__).parent / "results"


def main(
    text: Annotated[str | None, typer.Option(help="Its second half is evaluated; default: CPython's prose.")] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="Calibration texts; the first half of each; 'default' is CPython's prose.")
    ] = None,
    model: Annotated[str, typer.Option(help="MODEL, as for the command line.")] = DEMO,
    keep: Annotated[float, typer.Option(help="Share of neurons that stays.")] = 0.7,
    multiple: Annotated[int, typer.Option(help="Widths are multiples of this.")] = 64,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    evaluation_tokens: Annotated[int, typer.Option(help="Evaluation tokens.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    only: Annotated[str, typer.Option(help="Only rows of this method; empty for all.")] = "",
    name: Annotated[str, typer.Option(help="Of the results file.")] = "quality",
) -> None:
    """Measure the table and write it."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(model)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"machine": machine.facts(), "model": model, "window": window, "multiple": multiple}
    content, evaluation_name = load_text(f"{text}:second" if text else None, "second")
    held_out = token_windows(tokenizer, content, evaluation_tokens, window)
    with Bars() as bars:
        dense = perplexity(load_model(model), held_out, bars).perplexity
        for source in calibrate or ["default"]:
            content, source_name = load_text(None if source == "default" else f"{source}:first", "first")
            batches = token_windows(tokenizer, content, tokens, window)
            for method, compensate in ROWS:
                if only and method != only:
                    continue
                pruned = load_model(model)
                config = PruneConfig(keep=keep, method=method, compensate=compensate, multiple=multiple)
                report = prune(pruned, config, batches, progress=bars)
                row = {
                    "calibration": source_name,
                    "method": method,
                    "compensate": compensate,
                    "perplexity": perplexity(pruned, held_out, bars).perplexity,
                    "removed": 1 - report.mask.keep,
                    "prune_seconds": report.seconds,
                }
                rows.append(row)
    facts |= {"evaluation": evaluation_name, "evaluation_tokens": held_out.numel(), "tokens": tokens, "dense": dense}
    facts |= {"rows": rows, "seconds": time.perf_counter() - started}
    with new_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    columns = ("calibrated on", "method", "compensation", ">perplexity", ">removed")
    cells = [
        (r["calibration"], r["method"], r["compensate"], f"{r['perplexity']:.2f}", f"{r['removed']:.1%}") for r in rows
    ]
    show(facts, False, table(f"{model}, {evaluation_name}, dense {dense:.2f}", columns, cells))


if __name__ == "__main__":
    typer.run(main)
