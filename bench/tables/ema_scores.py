"""The table of bench/experiments/ema_scores.py: every score by how much of the past it holds, paired by seed."""

from __future__ import annotations

import math
from typing import Any

from bench.experiments.finetune.intervals import over_seeds
from bench.tables.readme import markdown, provenance

Entry = dict[str, Any]
Cell = tuple[int, int, float]
LAST, EMA, SUM = "last batch", "EMA", "sum"


def verdict(found: dict[str, Any]) -> str:
    """Of a ratio of perplexities: `better` or `worse` where its interval leaves out 1."""
    if found["low"] is None:
        return "one seed"
    return "better" if found["high"] < 1 else "worse" if found["low"] > 1 else "no difference shown"


def ratio(logs: list[float]) -> dict[str, Any]:
    """Geometric mean of ratios whose logarithms are given, one a seed, with its interval."""
    found = over_seeds(logs)
    return {key: found[key] if found[key] is None or key == "n" else math.exp(found[key]) for key in found}


def _shown(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


class Runs:
    """The runs of a result, by what is compared."""

    def __init__(self, result: Entry) -> None:
        runs = result["runs"].values()
        self.found: dict[tuple[str, str, Cell, int], float] = {
            (r["family"], r["form"], (r["batch"], r["steps"], r["keep"]), r["seed"]): r["perplexity"] for r in runs
        }
        self.cells = sorted({key[2] for key in self.found if key[0] != "dense"}, key=lambda c: (c[0], c[1], -c[2]))
        self.forms = list(dict.fromkeys(key[:2] for key in self.found if key[0] != "dense"))
        self.seeds = sorted({key[3] for key in self.found})

    def values(self, family: str, form: str, cell: Cell) -> list[float]:
        """Perplexities, one a seed."""
        return [self.found[key] for seed in self.seeds if (key := (family, form, cell, seed)) in self.found]

    def logs(self, family: str, form: str, base: str, cells: list[Cell]) -> list[float]:
        """Log perplexity of a form less that of another, the mean over cells of each seed that has all."""
        gained = []
        for seed in self.seeds:
            pairs = [[self.found.get((family, f, cell, seed)) for f in (form, base)] for cell in cells]
            if all(a is not None and b is not None for a, b in pairs):
                gained.append(sum(math.log(a / b) for a, b in pairs) / len(pairs))  # type: ignore[operator]
        return gained


def answers(result: Entry) -> list[Entry]:
    """Every form of a score over its last batch alone, and an EMA over the sum, where there is one.

    Each has `family`, `form`, `base`, the `ratio` over all cells with its `verdict`, and how many of the `cells` are
    `better` or `worse` by themselves.
    """
    runs = Runs(result)
    pairs = [(family, form, LAST) for family, form in runs.forms if form != LAST]
    pairs += [(family, EMA, form) for family, form in runs.forms if form == SUM]
    found = []
    for family, form, base in pairs:
        if not (logs := runs.logs(family, form, base, runs.cells)):
            continue
        each = [verdict(ratio(own)) for cell in runs.cells if (own := runs.logs(family, form, base, [cell]))]
        counts = {word: each.count(word) for word in ("better", "worse")}
        whole, names = ratio(logs), {"family": family, "form": form, "base": base}
        found.append({**names, "ratio": whole, "verdict": verdict(whole), "cells": len(each), **counts})
    return found


def ema_scores_table(result: Entry) -> list[str]:
    """Lines for docs/finetuning.md: perplexity by cell, then what smoothing changes."""
    if not result["runs"]:
        return ["Nothing was run yet."]
    runs, setting = Runs(result), result["setting"]
    start, seconds = result["dense"]["start"], sum(run["cpu_seconds"] for run in result["runs"].values())
    rows = [
        [family, form, *(f"{math.exp(over_seeds([math.log(v) for v in values])['mean']):.2f}" if values else "-"
        for values in (runs.values(family, form, cell) for cell in runs.cells))]
        for family, form in runs.forms
    ]  # fmt: skip
    dense = [runs.values("dense", "trained on", (batch, steps, 1.0)) for batch, steps, _ in runs.cells]
    rows.insert(0, ["dense", "trained on", *(f"{sum(v) / len(v):.2f}" if v else "-" for v in dense)])
    header = ["score", "of", *(f">{batch} x {steps}, {keep:.0%}" for batch, steps, keep in runs.cells)]
    lines = [
        [a["family"], a["form"], a["base"], _shown(a["ratio"]), a["verdict"], f"{a['better']} of {a['cells']}"]
        for a in answers(result)
    ]
    return [
        f"The small GPT-2, trained on E2E NLG to a perplexity of {start['value']:.2f}, pruned in few steps "
        f"of few texts (batch x steps, share kept) at a rate of {setting['rate']:g}; {len(runs.seeds)} seeds, "
        f"{len(result['runs'])} runs, {seconds / 60:.0f} min of CPU time. {provenance(result)}",
        "",
        "Held-out perplexity, geometric mean over seeds:",
        "",
        *markdown(header, rows),
        "",
        "Perplexity of one form of a score over another, paired by seed; mean over all cells with its 95 % interval "
        "over seeds, then in how many single cells it is better by its own interval:",
        "",
        *markdown(["score", "of", "against", ">perplexity, over", "it is", ">better in"], lines),
    ]
