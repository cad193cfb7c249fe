"""The attempts at a strategy for generation: what each arm keeps, and what of that is more than its perplexity says.

Of an arm the same items are measured after calibration on each sample. What arms differ by is taken within each sample,
and its interval is over samples: which tokens a model was calibrated on moves its answers by more than which questions
were asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.experiments.finetune.intervals import over_seeds
from bench.tables.readme import markdown, provenance

Rows = dict[str, Any]
CHOSEN = {"kl": "the KL", "hidden": "the hidden state"}
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
    **{measure: f"own text, wanda, damping and target by {words}" for measure, words in CHOSEN.items()},
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
    """One arm's rows, one of each sample, and what it is called."""

    def __init__(self, name: str, rows: Sequence[Rows], also: Sequence[str] = ()) -> None:
        self.name, self.rows, self.also = name, rows, also
        self.losses = [loss(row) for row in rows]
        by = " and by ".join(CHOSEN[measure] for measure in also)
        self.words = f"{WORDS[name]} (chosen by {by})" if also else WORDS.get(name, name)

    def of(self, sample: int) -> Rows | None:
        """The row of a sample; of the dense model, which is calibrated on nothing, always its one."""
        return next((row for row in self.rows if row["sample"] == sample or self.name == "dense"), None)


def line_of(found: dict[str, Arm], dense: Arm) -> list[Arm]:
    """The models that perplexity is compared with: dense, and calibrated on prose with more and more removed."""
    return [dense, *(found[name] for name in LINE if name in found)]


def arms(rows: Rows) -> dict[str, Arm]:
    """The arms that were measured, in the order of `WORDS`, and what `CHOSEN` takes of `GRID`."""
    there = {name: [row for row in rows.values() if row["arm"] == name] for name in WORDS}
    also: dict[str, list[str]] = {}
    for measure in CHOSEN:
        chosen = [_least(grid, measure) for grid in _grids(rows)]
        if chosen and (same := [name for name in GRID if there[name] == chosen]):
            also.setdefault(same[0], []).append(measure)
        else:
            there[measure] = chosen
    return {name: Arm(name, found, also.get(name, ())) for name, found in there.items() if found}


def _grids(rows: Rows) -> list[list[Rows]]:
    """The rows of `GRID` by sample, where all of them are there."""
    samples = sorted({row["sample"] for row in rows.values()})
    found = [[row for row in rows.values() if row["sample"] == s and row["arm"] in GRID] for s in samples]
    return [grid for grid in found if len(grid) == len(GRID)]


def _least(grid: Sequence[Rows], measure: str) -> Rows:
    """The row that a measure chooses, on text that it is not judged on."""
    return min(grid, key=lambda row: _mean(row["chosen_by"][measure]))


def differences(arm: Arm, line: Sequence[Arm], measure: str) -> list[float]:
    """By how much an arm's mean is above that of `line` at its perplexity, in each sample that all have; `line` of one
    arm is taken as it is.
    """
    found = []
    for row in arm.rows:
        others = [other for one in line if (other := one.of(row["sample"])) is not None]
        if len(others) == len(line):
            parts = [1.0] if len(line) == 1 else weights(loss(row), [loss(other) for other in others])
            means = [_mean(items(other, measure)) for other in others]
            found.append(_mean(items(row, measure)) - math.fsum(p * m for p, m in zip(parts, means, strict=True)))
    return found


def _points(values: Sequence[float]) -> str:
    if not values:
        return "-"
    found = over_seeds(values)
    interval = "" if found["low"] is None else f" ({found['low']:+.1%} to {found['high']:+.1%})"
    return f"{found['mean']:+.1%}{interval}"


def _spread(values: Sequence[float], pattern: str) -> str:
    middle = sum(values) / len(values)
    if len(values) == 1:
        return pattern.format(middle)
    return f"{pattern.format(middle)} ({pattern.format(min(values))} to {pattern.format(max(values))})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(arm: Arm, dense: Arm, base: Arm, line: Sequence[Arm]) -> list[str]:
    ratios = [math.exp(value - dense.losses[0]) for value in arm.losses]
    prose = [math.exp(_mean(row["losses"]["wikipedia"])) for row in arm.rows]
    kl = [_mean(row["kl"]) for row in arm.rows]
    exact = [_mean(items(row, "exact")) for row in arm.rows]
    repeated = [_mean(items(row, "repeated")) for row in arm.rows]
    shown = [_spread(ratios, "{:.3f}"), _spread(prose, "{:.1f}"), _spread(kl, "{:.3f}")]
    shown += [_spread(exact, "{:.1%}"), _spread(repeated, "{:.1%}")]
    compared = [
        _points(differences(arm, others, measure)) if arm.name not in LINE else "-"
        for measure in ("exact", "repeated")
        for others in ([base], line)
    ]
    return [arm.words, str(len(arm.rows)), *shown, *compared]


COLUMNS = ("samples", "perplexity over dense", "WikiText", "KL on own text", "answers right", "repeated 4-grams")
COMPARED = ("answers, less prose", "at its perplexity", "repeated, less prose", "at its perplexity")


def verdict(values: Sequence[float], sign: int) -> str:
    """What differences by sample say, where `sign` times a positive one is better."""
    if not values:
        return "not measured yet"
    found = over_seeds(values)
    if found["mean"] == 0:
        return "no difference shown"
    word = "better" if sign * found["mean"] > 0 else "worse"
    if found["low"] is None:
        return f"{word} in one sample, which has no interval"
    if found["low"] * found["high"] > 0:
        return word
    if all(value * found["mean"] > 0 for value in values):
        return f"{word} in each of {len(values)} samples, though not by the interval"
    return "no difference shown"


def _sentence(words: str, names: Sequence[str], found: dict[str, Arm], line: Sequence[Arm]) -> str:
    """The answer to one attempt: what answers and repetition are at equal perplexity."""
    parts = []
    for arm in found.values():
        if arm.name in names or set(arm.also) & set(names):
            answers, repeated = (verdict(differences(arm, line, m), s) for m, s in (("exact", 1), ("repeated", -1)))
            parts.append(f"{arm.words}: answers {answers}, repetition {repeated}")
    return f"- **{words}** {'; '.join(parts) or 'Not measured yet'}."


def strategy(result: Rows) -> tuple[list[str], list[str]]:
    """The answers in a sentence each, and the section of docs/findings.md with its table."""
    found, settings = arms(result["rows"]), result["settings"]
    if BASE not in found:
        return [], []
    dense = Arm("dense", [result["rows"]["dense 0"]])
    line = line_of(found, dense)
    lead = "A strategy for generation, at equal perplexity beside calibration on prose (SmolLM2-135M, 30 % removed):"
    answers = [
        _sentence(f"{lead} own text.", ("continued", "own", "half own"), found, line),
        _sentence("By the KL of next-token probabilities.", ("fisher", "widths", *CHOSEN), found, line),
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
        f"Differences are taken within each sample; intervals are 95 %, Student's t over samples. {provenance(result)}",
        "",
        f"    {result['command']}",
        "",
        *markdown(["calibrated on", *(f">{name}" for name in (*COLUMNS, *COMPARED))], cells),
    ]
    return answers, body
