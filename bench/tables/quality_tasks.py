"""The table of bench/experiments/quality_tasks.py, with PIQA and repetition of the same models from `compare`."""

from __future__ import annotations

from typing import Any

import torch

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.tasks.estimates import Metric, metric

# Task -> what it is called, and what guessing gives.
TASKS = {"sentiment": ("sentiment", 0.5), "translation": ("translation", 0.25), "generation": ("facts written", 0.0)}
# Row -> the same model in compare-suite.json: its setting and share kept.
COMPARED = {
    "30 % removed": ("pyprune", 0.7),
    "30 % removed, --best": ("pyprune --best", 0.7),
    "50 % removed, --best": ("pyprune --best", 0.5),
    "30% removed at random": ("random", 0.7),
}
Result = dict[str, Any]


def compared(result: Result) -> dict[str, dict[str, Metric]]:
    """Row -> task -> the metric, of the dense model alone in its own row."""
    scores = {
        label: {task: torch.tensor(row["scores"][task], dtype=torch.float64) for task in TASKS}
        for label, row in result["rows"].items()
    }
    return {
        label: {
            task: metric(scores["dense"][task], None if label == "dense" else mine[task], chance)
            for task, (_, chance) in TASKS.items()
        }
        for label, mine in scores.items()
    }


def _percent(value: float, interval: Any) -> str:
    return f"{value:.0%} ({interval[0]:.0%} to {interval[1]:.0%})"


def _cell(found: Metric) -> str:
    """The score with its interval; a star where the difference from dense leaves out 0."""
    if found.pruned is None or found.difference is None:
        return _percent(found.dense.value, found.dense.interval)
    low, high = found.difference.interval
    return _percent(found.pruned.value, found.pruned.interval) + ("*" if low > 0 or high < 0 else "")


def _elsewhere(suite: Result, label: str) -> list[str]:
    """PIQA by bytes and repeated 4-grams of the same model, where `compare` measured it."""
    rows = [r for r in suite["rows"] if (r["label"], r["keep"]) == COMPARED.get(label) and "error" not in r]
    found = suite["dense_tasks"] if label == "dense" else rows[0] if rows else None
    if found is None:
        return ["-", "-"]
    both = (found["piqa"]["accuracy_byte"], found["generation"]["repetition"])
    return [_percent(one["value"], one["interval"]) for one in both]


def quality_tasks_table(results: dict[str, Result]) -> list[str]:
    """Lines for docs/quality.md: a row a model."""
    own, suite = results["quality-tasks"], results["compare-suite"]
    found = compared(own)
    counts = {task: len(of) for task, of in own["rows"]["dense"]["scores"].items()}
    asked = ", ".join(f"{counts[task]} of {name}" for task, (name, _) in TASKS.items())
    chances = ", ".join(f"{name} {chance:.0%}" for name, chance in TASKS.values() if chance)
    rows = [[label, *(_cell(of[t]) for t in TASKS), *_elsewhere(suite, label)] for label, of in found.items()]
    names = [*(name for name, _ in TASKS.values()), "PIQA", "repeated 4-grams"]
    piqa = suite["dense_tasks"]["piqa"]["items"]
    return [
        f"{model_name(own['model'])}, items: {asked}, and {piqa} of PIQA; guessing gives {chances}, PIQA 50%. 95 % "
        f"intervals over items; a star: the interval of the difference from dense, paired by item, leaves out 0 (PIQA "
        f"and repetition, from the table above, are not paired). {provenance(own)}",
        "",
        *markdown(["model", *(f">{name}" for name in names)], rows),
    ]
