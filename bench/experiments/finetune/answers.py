"""What the runs say, from the numbers alone: paired differences over seeds, with intervals, and a sentence each."""

from __future__ import annotations

from typing import Any

from .intervals import over_seeds
from .metrics import METRICS
from .settings import DENSE

Run = dict[str, Any]
Groups = dict[tuple[str, str, str], list[Run]]
PERPLEXITY = "perplexity"
# Share of neurons without a twin, in per cent: of the redundancy of a run, beside its metrics.
UNIQUE = "unique"
THRESHOLD = "0.8"
_LABELS = {PERPLEXITY: "perplexity", UNIQUE: f"neurons unique at cos {THRESHOLD}, %"}
# (question, left, right): is left better than right?
PAIRS = (
    ("Is random comparable to movement?", "random", "movement"),
    ("Does GUM beat movement?", "gum", "movement"),
    ("Does GUM beat random?", "gum", "random"),
    ("Does movement beat magnitude?", "movement", "magnitude"),
)


def groups(result: dict[str, Any]) -> Groups:
    """Runs by (task, model, size), in the order of the result."""
    found: Groups = {}
    for run in result["runs"].values():
        found.setdefault((run["task"], run["model"], run["size"]), []).append(run)
    return found


def main_metric(runs: list[Run]) -> str:
    """The metric that the task names first."""
    return str(next(iter(runs[0]["metrics"])))


def label(metric: str) -> str:
    """The name of a metric in tables."""
    return _LABELS[metric] if metric in _LABELS else METRICS[metric].label


def value(run: Run, metric: str) -> float:
    """One number of a run."""
    if metric == UNIQUE:
        return 100 * float(run["redundancy"]["unique"][THRESHOLD])
    return float(run["metrics"][metric]["value"])


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
        return "one seed, no interval"
    if found["low"] <= 0 <= found["high"]:
        return "no difference shown"
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


def _numbers(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _sentence(question: str, metric: str, what: str, found: dict[str, Any]) -> str:
    cells = found["cells"]
    count = {word: sum(c["verdict"] == word for c in cells) for word in ("better", "worse")}
    return (
        f"{question} {label(metric)}, {what}, mean over the grid of each of {found['n']} seeds: {_numbers(found)}: "
        f"{found['verdict']}; cell by cell better in {count['better']}, worse in {count['worse']} of {len(cells)}."
    )


def _inside(runs: list[Run], metric: str, left: str, right: str) -> str:
    """In how many cells the mean of `left` lies in the interval of `right` over seeds."""
    places = sorted({(r["keep"], r["distilled"]) for r in runs if r["method"] in (left, right)})
    inside = total = 0
    for keep, distilled in places:
        a, b = (cell(runs, method, keep, distilled) for method in (left, right))
        if not a or len(b) < 2:
            continue
        bounds = over_seeds([value(r, metric) for r in b])
        total += 1
        inside += bounds["low"] <= over_seeds([value(r, metric) for r in a])["mean"] <= bounds["high"]
    return f"The mean of {left} lies in the interval of {right} in {inside} of {total} cells." if total else ""


def _range(runs: list[Run], metric: str, distilled: bool, keep: float) -> float | None:
    means = []
    for method in sorted({r["method"] for r in runs} - {DENSE}):
        if found := cell(runs, method, keep, distilled):
            means.append(over_seeds([value(r, metric) for r in found])["mean"])
    return max(means) - min(means) if len(means) > 1 else None


def _ranges(runs: list[Run], metric: str) -> dict[str, Any] | None:
    """Best minus worst method without and with distillation, at each keep that has both."""
    keeps = sorted({r["keep"] for r in runs if r["method"] != DENSE})
    rows = [(keep, *(_range(runs, metric, distilled, keep) for distilled in (False, True))) for keep in keeps]
    rows = [row for row in rows if None not in row]
    if not rows:
        return None
    narrower = sum(after < before for _, before, after in rows)
    words = ", ".join(f"{keep:.0%}: {before:.2f} to {after:.2f}" for keep, before, after in rows)
    return {
        "question": "Does distillation narrow the differences between methods?",
        "metric": metric,
        "ranges": [{"keep": keep, "plain": before, "distilled": after} for keep, before, after in rows],
        "sentence": f"Does distillation narrow the differences between methods? {label(metric)}, best minus worst "
        f"method by keep: {words}; narrower in {narrower} of {len(rows)}.",
    }


def answers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of the experiment, answered for each (task, model, size) by main metric, perplexity and uniqueness.

    Returns:
        Entries with `task`, `model`, `size`, `question`, `metric`, `sentence`; those of a comparison also `mean`,
        `low`, `high`, `n` (left minus right, each seed's mean over the grid), `verdict` and `cells`.
    """
    found = []
    for (task, model, size), runs in groups(result).items():
        place = {"task": task, "model": model, "size": size}
        for metric in (main_metric(runs), PERPLEXITY, UNIQUE):
            higher = metric == UNIQUE or (metric != PERPLEXITY and METRICS[metric].higher)
            for question, left, right in PAIRS:
                differences = _paired(runs, metric, "method", left, right)
                if differences:
                    summary = _summary(differences, higher)
                    words = _sentence(question, metric, f"{left} minus {right}", summary)
                    words = f"{words} {_inside(runs, metric, left, right)}".strip()
                    found.append({**place, "question": question, "metric": metric, **summary, "sentence": words})
            differences = _paired(runs, metric, "distilled", True, False)
            if differences:
                question, summary = "What does distillation change?", _summary(differences, higher)
                words = _sentence(question, metric, "distilled minus plain", summary)
                found.append({**place, "question": question, "metric": metric, **summary, "sentence": words})
            if ranges := _ranges(runs, metric):
                found.append({**place, **ranges})
    return found
