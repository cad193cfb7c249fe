"""The attempts at a strategy for generation: what each arm keeps, and what of that is more than its perplexity says.

Of an arm the same items are measured after calibration on each sample, and averaged; intervals are 95 %, by bootstrap
over items, drawn together for all arms. Perplexity has no interval there: it is what is held equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.tables.readme import markdown, provenance
from pyprune.evaluation.intervals import bootstrap_of

Rows = dict[str, Any]
CHOSEN = ("kl", "hidden")
GRID = ("own", "target", "ridge", "ridge, target")
BASE, LINE = "prose", ("prose, 20 %", "prose", "prose, 40 %")
WORDS = {
    "prose": "WikiText, wanda",
    "continued": "WikiText's beginnings, continued by the model itself, wanda",
    "own": "the model's own text, wanda",
    "half own": "half WikiText, half own text, wanda",
    "fisher": "own text, neurons by the curvature of the KL",
    "widths": "own text, wanda, widths by the loss on it",
    "target": "own text, wanda, target 0.5",
    "ridge": "own text, wanda, damping 0.1",
    "ridge, target": "own text, wanda, damping 0.1, target 0.5",
    "kl": "own text, wanda, damping and target by the KL",
    "hidden": "own text, wanda, damping and target by the hidden state",
    "prose, 20 %": "WikiText, wanda, 20 % removed",
    "prose, 40 %": "WikiText, wanda, 40 % removed",
}


def loss(row: Rows) -> float:
    """Mean over domains of the mean loss in nats; its exponential is the geometric mean of perplexities."""
    return math.fsum(sum(values) / len(values) for values in row["losses"].values()) / len(row["losses"])


def items(row: Rows, measure: str) -> list[float]:
    """What a measure gave for each question or text: `exact`, or `repeated`."""
    if measure == "repeated":
        return [*row["repeated"]["chat"], *row["repeated"]["prose"]]
    found: list[float] = row["answers"][measure]
    return found


def weights(at: float, line: Sequence[float]) -> list[float]:
    """How much of each point of a rising line makes its value at `at`, straight between and beyond its points.

    >>> weights(1.5, [1.0, 2.0, 4.0])
    [0.5, 0.5, 0.0]
    """
    i = max(0, min(len(line) - 2, sum(point <= at for point in line) - 1))
    share = (at - line[i]) / (line[i + 1] - line[i])
    return [1 - share if j == i else share if j == i + 1 else 0.0 for j in range(len(line))]


class Arm:
    """One arm's rows: `samples` of them, mean `loss`, and `[N]` mean items by measure."""

    def __init__(self, name: str, rows: Sequence[Rows]) -> None:
        self.name, self.rows = name, rows
        self.losses = [loss(row) for row in rows]
        self.loss = sum(self.losses) / len(rows)

    def items(self, measure: str) -> Tensor:
        return torch.tensor([items(row, measure) for row in self.rows], dtype=torch.float64).mean(0)


def line_of(found: dict[str, Arm], dense: Arm) -> list[Arm]:
    """The models that perplexity is compared with: dense, and calibrated on prose with more and more removed."""
    return [dense, *(found[name] for name in LINE if name in found)]


def arms(rows: Rows) -> dict[str, Arm]:
    """The arms that were measured, in the order of `WORDS`, and what `CHOSEN` takes of `GRID`."""
    there = {name: [row for row in rows.values() if row["arm"] == name] for name in WORDS}
    for measure in CHOSEN:
        there[measure] = [_least(grid, measure) for grid in _grids(rows)]
    return {name: Arm(name, found) for name, found in there.items() if found}


def _grids(rows: Rows) -> list[list[Rows]]:
    """The rows of `GRID` by sample, where all of them are there."""
    samples = sorted({row["sample"] for row in rows.values()})
    found = [[row for row in rows.values() if row["sample"] == s and row["arm"] in GRID] for s in samples]
    return [grid for grid in found if len(grid) == len(GRID)]


def _least(grid: Sequence[Rows], measure: str) -> Rows:
    """The row that a measure chooses, on text that it is not judged on."""
    return min(grid, key=lambda row: _mean(row["chosen_by"][measure]))


def against(arm: Arm, line: Sequence[Arm], measure: str) -> tuple[float, tuple[float, float]]:
    """By how much an arm's mean is above that of `line` at its perplexity, with the interval; `line` of one arm is
    taken as it is.
    """
    columns = torch.stack([arm.items(measure), *(other.items(measure) for other in line)], 1)
    parts = [1.0] if len(line) == 1 else weights(arm.loss, [other.loss for other in line])
    signs = torch.tensor([1.0, *(-part for part in parts)], dtype=torch.float64)
    return float(columns.mean(0) @ signs), bootstrap_of(columns, lambda means: means @ signs)


def _points(found: tuple[float, tuple[float, float]]) -> str:
    value, (low, high) = found
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})"


def _spread(values: Sequence[float], pattern: str) -> str:
    middle = sum(values) / len(values)
    if len(values) == 1:
        return pattern.format(middle)
    return f"{pattern.format(middle)} ({pattern.format(min(values))} to {pattern.format(max(values))})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(arm: Arm, dense: Arm, base: Arm, line: Sequence[Arm]) -> list[str]:
    ratios = [math.exp(value - dense.loss) for value in arm.losses]
    prose = [math.exp(_mean(row["losses"]["wikipedia"])) for row in arm.rows]
    kl = [_mean(row["kl"]) for row in arm.rows]
    exact = [_mean(items(row, "exact")) for row in arm.rows]
    repeated = [_mean(items(row, "repeated")) for row in arm.rows]
    shown = [_spread(ratios, "{:.3f}"), _spread(prose, "{:.1f}"), _spread(kl, "{:.3f}")]
    shown += [_spread(exact, "{:.1%}"), _spread(repeated, "{:.1%}")]
    compared = [
        _points(against(arm, others, measure)) if arm.name not in LINE else "-"
        for measure in ("exact", "repeated")
        for others in ([base], line)
    ]
    return [WORDS[arm.name], str(len(arm.rows)), *shown, *compared]


COLUMNS = ("samples", "perplexity over dense", "WikiText", "KL on own text", "answers right", "repeated 4-grams")
COMPARED = ("answers, less prose", "at its perplexity", "repeated, less prose", "at its perplexity")


def verdicts(found: dict[str, Arm], line: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """For each arm what its answers and its repetition are at equal perplexity: better, worse or no difference."""
    named = {}
    for name, arm in found.items():
        if name not in LINE:
            signs = [(against(arm, line, "exact")[1], 1), (against(arm, line, "repeated")[1], -1)]
            named[name] = tuple(
                "better"
                if sign * low > 0 and sign * high > 0
                else "worse"
                if sign * low < 0 and sign * high < 0
                else "="
                for (low, high), sign in signs
            )
    return named  # type: ignore[return-value]


def _sentence(words: str, names: Sequence[str], found: dict[str, tuple[str, str]]) -> str:
    """The answer to one attempt."""
    parts = []
    for name in (name for name in names if name in found):
        answers, repeated = found[name]
        said = {"better": "better", "worse": "worse", "=": "no difference shown"}
        parts.append(f"{WORDS[name]}: answers {said[answers]}, repetition {said[repeated]}")
    return f"- **{words}** {'; '.join(parts) or 'Not measured yet'}."


def strategy(result: Rows) -> tuple[list[str], list[str]]:
    """The answers in a sentence each, and the section of docs/findings.md with its table."""
    found, settings = arms(result["rows"]), result["settings"]
    if BASE not in found:
        return [], []
    dense = Arm("dense", [result["rows"]["dense 0"]])
    line = line_of(found, dense)
    said = verdicts(found, line)
    lead = "A strategy for generation, at equal perplexity beside calibration on prose (SmolLM2-135M, 30 % removed):"
    answers = [
        _sentence(f"{lead} own text.", ("continued", "own", "half own"), said),
        _sentence("The same, choosing by the KL of next-token probabilities.", ("fisher", "widths", *CHOSEN), said),
    ]
    cells = [_row(arm, dense, found[BASE], line) for arm in found.values()]
    body = [
        "## A strategy for generation",
        "",
        f"{settings['model']}, {settings['tokens']:,} tokens of calibration in windows of {settings['window']}, fits "
        "by least squares, no recovery; each sample calibrates on other tokens, and what stands in brackets behind a "
        "mean is the lowest and the highest of them. Perplexity is the geometric mean of six domains "
        f"({settings['domain_tokens']:,} tokens each); answers are those of the generation task that ships "
        f"({len(items(dense.rows[0], 'exact'))} questions, exact), repeated 4-grams of {settings['new_tokens']} greedy "
        f"tokens after {len(items(dense.rows[0], 'repeated'))} prompts, half of them in the chat template. Dense: "
        f"answers {_mean(items(dense.rows[0], 'exact')):.1%}, repeated {_mean(items(dense.rows[0], 'repeated')):.1%}. "
        "`at its perplexity` is the difference to models calibrated on prose and cut to the share at which they would "
        "have the same perplexity, straight between the shares measured, the dense model among them. "
        "Intervals are 95 %, by bootstrap over "
        f"questions or prompts. {provenance(result)}",
        "",
        f"    {result['command']}",
        "",
        *markdown(["calibrated on", *(f">{name}" for name in (*COLUMNS, *COMPARED))], cells),
    ]
    return answers, body
