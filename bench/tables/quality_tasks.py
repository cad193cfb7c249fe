"""The table of bench/experiments/quality_tasks.py: what dense and pruned models score by task, item by item."""

from __future__ import annotations

from typing import Any

import torch

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.tasks.estimates import Estimate, Metric, metric

# Task -> what it is called, and what guessing gives; None where less is better and nothing is guessed.
TASKS: dict[str, tuple[str, float | None]] = {
    "sentiment": ("sentiment", 0.5),
    "translation": ("translation", 0.25),
    "choice": ("questions, of four", 0.25),
    "piqa": ("questions, PIQA", 0.5),
    "generation": ("generation, facts", 0.0),
    "repeats": ("generation, repeated 4-grams", None),
}


def compared(result: dict[str, Any]) -> dict[str, dict[str, Metric]]:
    """Row -> task -> the metric, of the dense model alone in its own row."""
    found: dict[str, dict[str, Metric]] = {}
    dense = {task: torch.tensor(of, dtype=torch.float64) for task, of in result["rows"]["dense"]["scores"].items()}
    for label, row in result["rows"].items():
        mine = {task: torch.tensor(of, dtype=torch.float64) for task, of in row["scores"].items()}
        found[label] = {
            task: metric(dense[task], None if label == "dense" else mine[task], chance)
            for task, (_, chance) in TASKS.items()
        }
    return found


def _percent(found: Estimate) -> str:
    low, high = found.interval
    return f"{found.value:.0%} ({low:.0%} to {high:.0%})"


def _cell(found: Metric) -> str:
    """The score with its interval; a star where the difference from dense leaves out 0."""
    if found.pruned is None or found.difference is None:
        return _percent(found.dense)
    low, high = found.difference.interval
    return _percent(found.pruned) + ("*" if low > 0 or high < 0 else "")


def quality_tasks_table(result: dict[str, Any]) -> list[str]:
    """Lines for docs/quality.md: a row a model."""
    if "dense" not in result["rows"]:
        return ["Nothing was asked yet."]
    found, counts = compared(result), {t: len(s) for t, s in result["rows"]["dense"]["scores"].items()}
    chances = [f"{name} {chance:.0%}" for name, chance in TASKS.values() if chance]
    rows = [[label, *(_cell(of[task]) for task in TASKS)] for label, of in found.items()]
    asked = ", ".join(f"{counts[task]} of {name}" for task, (name, _) in TASKS.items())
    return [
        f"{model_name(result['model'])}. Items: {asked}. Right by guessing: {', '.join(chances)}. 95 % intervals over "
        f"items; a star: the interval of the difference from dense, paired by item, leaves out 0. {provenance(result)}",
        "",
        *markdown(["model", *(f">{name}" for name, _ in TASKS.values())], rows),
    ]
