"""What the runs say, from the numbers alone: paired differences over seeds, and what goes along with quality."""

from __future__ import annotations

import math
from typing import Any

from .correlation import correlation
from .intervals import over_seeds
from .metrics import METRICS
from .recipes import completed
from .settings import DENSE

Run = dict[str, Any]
Groups = dict[tuple[str, str, str], list[Run]]
PERPLEXITY = "perplexity"
# Share of neurons without a twin, in per cent, and mean sensitivity: of the redundancy of a run, beside its metrics.
UNIQUE, SENSITIVITY = "unique", "sensitivity"
THRESHOLD = "0.8"
_LABELS = {PERPLEXITY: "perplexity", UNIQUE: f"neurons unique at cos {THRESHOLD}, %", SENSITIVITY: "sensitivity"}
# (left, right): is left better than right?
PAIRS = (
    ("random", "magnitude"),
    ("random", "movement"),
    ("random", "l0"),
    ("gum", "random"),
    ("gum", "movement"),
    ("l0", "magnitude"),
    ("l0", "movement"),
    ("movement", "magnitude"),
)
NONE_SHOWN, ONE_SEED = "no difference shown", "one seed, no interval"


def groups(result: dict[str, Any]) -> Groups:
    """Runs by (task, model, size), in the order of the result; of each those by the recipe of the newest."""
    found: Groups = {}
    for run in result["runs"].values():
        found.setdefault((run["task"], run["model"], run["size"]), []).append(run)
    for place, runs in found.items():
        newest = completed(max(runs, key=lambda run: str(run.get("date", "")))["recipe"])
        found[place] = [run for run in runs if completed(run["recipe"]) == newest]
    return found


def main_metric(runs: list[Run]) -> str:
    """The metric that the task names first; perplexity where it names none."""
    return str(next(iter(runs[0]["metrics"])))


def quality(runs: list[Run]) -> list[str]:
    """The main metric, and perplexity."""
    return list(dict.fromkeys((main_metric(runs), PERPLEXITY)))


def label(metric: str) -> str:
    """The name of a metric in tables."""
    return _LABELS[metric] if metric in _LABELS else METRICS[metric].label


def higher_is_better(metric: str) -> bool:
    return metric == UNIQUE or (metric in METRICS and METRICS[metric].higher)


def value(run: Run, metric: str) -> float:
    """One number of a run, on the scale of means and differences: of a perplexity, which is positive and skewed over
    seeds, the natural logarithm.
    """
    if metric == UNIQUE:
        return 100 * float(run["redundancy"]["unique"][THRESHOLD])
    if metric == SENSITIVITY:
        return float(run["redundancy"]["sensitivity"])
    found = float(run["metrics"][metric]["value"])
    return math.log(found) if metric == PERPLEXITY else found


def shown(metric: str, number: float) -> float:
    """What a mean of `value` stands for: of perplexities the geometric mean, and of a difference of them a ratio."""
    return math.exp(number) if metric == PERPLEXITY else number


def cell(runs: list[Run], method: str, keep: float, distilled: bool) -> list[Run]:
    """The runs of one cell of the grid, by seed."""
    wanted = (method, keep, distilled)
    return sorted((r for r in runs if (r["method"], r["keep"], r["distilled"]) == wanted), key=lambda r: r["seed"])


def _paired(runs: list[Run], metric: str, by: str, left: Any, right: Any) -> dict[Any, float]:
    """The other coordinates, the seed last -> left minus right of coordinate `by`, where both sides were run."""
    side: dict[Any, dict[Any, float]] = {left: {}, right: {}}
    for run in runs:
        if run["method"] != DENSE and run[by] in side:
            rest = tuple(run[name] for name in ("keep", "method", "distilled", "seed") if name != by)
            side[run[by]][rest] = value(run, metric)
    return {rest: side[left][rest] - side[right][rest] for rest in side[left] if rest in side[right]}


def verdict(found: dict[str, Any], higher: bool) -> str:
    """`better`, `worse` or `no difference shown`, where left minus right has this interval."""
    if found["low"] is None:
        return ONE_SEED
    if found["low"] <= 0 <= found["high"]:
        return NONE_SHOWN
    return "better" if (found["mean"] > 0) == higher else "worse"


def _summary(differences: dict[Any, float], higher: bool) -> dict[str, Any]:
    """The mean over cells of each seed that has all cells, over seeds; and each cell by itself."""
    cells: dict[Any, list[float]] = {}
    by_seed: dict[int, dict[Any, float]] = {}
    for (*place, seed), difference in differences.items():
        cells.setdefault(tuple(place), []).append(difference)
        by_seed.setdefault(seed, {})[tuple(place)] = difference
    whole = [sum(row.values()) / len(row) for row in by_seed.values() if len(row) == len(cells)]
    found = over_seeds(whole) if whole else {"mean": float("nan"), "low": None, "high": None, "n": 0}
    each = []
    for place, values in sorted(cells.items(), key=str):
        spread = over_seeds(values)
        each.append({"place": list(place), **spread, "verdict": verdict(spread, higher)})
    return {**found, "verdict": verdict(found, higher), "cells": each}


def _pairs(runs: list[Run]) -> list[tuple[str, str, Any, Any]]:
    """(coordinate, words, left, right) of every comparison; a method with options also against the method without."""
    variants = sorted({r["method"] for r in runs if ":" in r["method"]})
    pairs = [*PAIRS, *((method, method.partition(":")[0]) for method in variants)]
    found: list[tuple[str, str, Any, Any]] = [
        ("method", f"{left} against {right}", left, right) for left, right in pairs
    ]
    return [*found, ("distilled", "distilled against plain", True, False)]


def comparisons(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Paired differences of each (task, model, size) in main metric, log perplexity and uniqueness.

    Returns:
        Entries with `task`, `model`, `size`, `what`, `left`, `right`, `metric`; `mean`, `low`, `high`, `n` of left
        minus right, each seed's mean over the cells that both have; `verdict` and `cells`.
    """
    found = []
    for (task, model, size), runs in groups(result).items():
        for by, what, left, right in _pairs(runs):
            for metric in (*quality(runs), UNIQUE):
                if differences := _paired(runs, metric, by, left, right):
                    place = {"task": task, "model": model, "size": size, "what": what, "left": left, "right": right}
                    found.append({**place, "metric": metric, **_summary(differences, higher_is_better(metric))})
    return found


def correlations(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether better cells have more unique, or more sensitive, neurons; a cell has its mean over seeds.

    Returns:
        Entries with `task`, `model`, `size`, `metric`, `of` (`unique` or `sensitivity`), and two correlations, `all`
        cells together and `within` a share kept, distilled or not; positive where more goes along with better.
    """
    found = []
    for (task, model, size), runs in groups(result).items():
        places = sorted({(r["method"], r["keep"], r["distilled"]) for r in runs if r["method"] != DENSE})
        cells = [cell(runs, *place) for place in places]
        like = [(keep, distilled) for _, keep, distilled in places]
        methods = [method.partition(":")[0] for method, _, _ in places]

        def means(metric: str, cells: list[list[Run]] = cells) -> list[float]:
            return [sum(value(r, metric) for r in one) / len(one) for one in cells]

        for metric in quality(runs):
            good = [v if higher_is_better(metric) else -v for v in means(metric)]
            for of in (UNIQUE, SENSITIVITY):
                entry = {"task": task, "model": model, "size": size, "metric": metric, "of": of}
                entry["all"] = correlation(good, means(of), [0] * len(cells), methods)
                entry["within"] = correlation(good, means(of), like, methods)
                found.append(entry)
    return found


def ranges(runs: list[Run], metric: str) -> list[dict[str, float]]:
    """Highest minus lowest method (perplexity: over the lowest) by share kept, `plain` and `distilled`, where two
    methods or more have both.
    """
    found = []
    for keep in sorted({r["keep"] for r in runs if r["method"] != DENSE}):
        sides = [[cell(runs, m, keep, flag) for flag in (False, True)] for m in sorted({r["method"] for r in runs})]
        both = [[sum(value(r, metric) for r in side) / len(side) for side in pair] for pair in sides if all(pair)]
        if len(both) > 1:
            plain, distilled = (shown(metric, max(side) - min(side)) for side in zip(*both, strict=True))
            found.append({"keep": keep, "plain": plain, "distilled": distilled})
    return found
