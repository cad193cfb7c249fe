"""README's tables of perplexity: of many ways to prune, and before and after recovery."""

from __future__ import annotations

import math
from typing import Any

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.summary import MEAN, Line, Point, comparison_lines, judged_texts, perplexity_on

Result = dict[str, Any]


def _mean(point: Point) -> str:
    spread = f" ({point.lowest:.2f} to {point.highest:.2f})" if point.seeds > 1 else ""
    return f"{point.perplexity:.2f}{spread}"


def _compare_cells(lines: list[Line], keeps: list[float]) -> list[list[str]]:
    """A row a setting of `pyprune compare`, the best at the smallest share kept first; ours in bold."""
    cells = []
    for line in lines:
        points = {point.keep: point for point in line.points}
        values = [_mean(points[keep]) if keep in points else "-" for keep in keeps]
        seeds = max(point.seeds for point in line.points)
        label = line.label if seeds == 1 else f"{line.label} ({seeds} seeds)"
        row = [label.replace("|", "/"), line.group, *values]
        if line.group == "ours":
            row = [f"**{cell}**" for cell in row]
        order = [-points[keep].perplexity if keep in points else -math.inf for keep in reversed(keeps)]
        cells.append((order, [*row, f"{max(point.seconds for point in line.points):.0f} s"]))
    return [row for _, row in sorted(cells, reverse=True)]


def _compare_goal(goal: Result) -> str:
    if goal["met"] is None:
        return f"- {goal['text']}: ours at {1 - goal['our_keep']:.0%} removed: not measured"
    ours, published = goal["ours"], goal["published"]
    each = f" (and on {goal['domains_met']} of {goal['domains']} by itself)" if "domains" in goal else ""
    return (
        f"- {goal['text']}: {ours['label']} at {1 - goal['our_keep']:.0%} removed {ours['perplexity']:.2f}; best "
        f"published ({published['label']}) at {1 - goal['published_keep']:.0%} removed "
        f"{published['perplexity']:.2f}: {'met' if goal['met'] else 'not met'}{each}"
    )


def compare_table(result: Result) -> list[str]:
    """The result of `pyprune compare`: for each text settings by share removed; what failed; the goals."""
    keeps = sorted({row["keep"] for row in result["rows"]}, reverse=True)
    commits = sorted({str(row["source"]["commit"])[:10] for row in result["rows"]})
    measured = f" Rows measured at commits {', '.join(commits)}." if len(commits) > 1 else ""
    calibration = f"{result['calibration']['tokens']} tokens of {result.get('text', 'the calibration text')}"
    out = [f"{model_name(result.get('model', 'model'))}, calibrated on {calibration}. {provenance(result)}{measured}"]
    header = ["setting", "group", *(f">{1 - keep:.0%} removed" for keep in keeps), ">pruning took"]
    for text in judged_texts(result):
        dense = perplexity_on(result["dense"], text)
        cells = _compare_cells(comparison_lines(result, text), keeps)
        of = [entry["tokens"] for name, entry in result["evaluation"].items() if text in (name, MEAN)]
        tokens = sum(of)
        out += ["", f"Token perplexity on {tokens} tokens of {text}; dense {dense:.2f}.", "", *markdown(header, cells)]
    failed = [row for row in result["rows"] if "error" in row]
    if failed:
        out += ["", *(f"- no row: {r['label']} at {r['keep']}: {r['error']['message']}" for r in failed)]
    return [*out, "", "Goals.", "", *map(_compare_goal, result["goals"])]


def _interval(found: Result, key: str) -> str:
    low, high = found["interval"]
    return f"{found[key]:.1%} ({low:.1%} to {high:.1%})"


def recover_table(result: Result) -> list[str]:
    """The result of bench/model/recover.py: perplexity, multiple choice, and greedy text; then the goal."""
    models = result["models"].items()
    first, second = [], []
    for text in result["texts"]:
        for name, found in models:
            accuracy = _interval(found["choice"][text], "accuracy")
            lost = _interval(found["choice_lost"][text], "difference") if "choice_lost" in found else ""
            first.append([name, text, f"{found['perplexity'][text]:.2f}", accuracy, lost])
    for name, found in models:
        wrote, deltas = found["wrote"], found.get("generation")
        same = f"{deltas['divergence']:.1f} of {deltas['new_tokens']}" if deltas else ""
        rates = [f"{wrote['perplexity']:.2f}", f"{wrote['repetition']:.1%}", f"{wrote['distinct2']:.2f}"]
        second.append([name, f"{result['parameters'][name]:,}", same, *rates])
    goal = result["goal"]
    control = f"; {goal['control'] - 1:+.1%} of the dense model trained alike" if "control" in goal else ""
    choices = f"Multiple choice of {result['choices']}, chance {1 / result['choices']:.0%}, intervals of 95 %."
    greedy = f"Greedy text from {result['prompts']} prompts; perplexity is the dense model's of what each wrote."
    return [
        f"{model_name(result['dense'])}. {choices} {provenance(result)}",
        "",
        *markdown(["model", "text", ">perplexity", ">multiple choice", ">lost, same items"], first),
        "",
        greedy,
        "",
        *markdown(["model", ">parameters", ">as dense", ">perplexity", ">repeated 4-grams", ">distinct-2"], second),
        "",
        f"- {goal['text']}: recovered {goal['recovered']:.2f}, {goal['ratio'] - 1:+.1%} of dense {goal['dense']:.2f}; "
        f"at most {goal['limit'] - 1:+.0%}: {'met' if goal['met'] else 'not met'}{control}",
    ]
