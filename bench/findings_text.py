"""docs/findings.md, from the result of bench/bench_findings.py: four claims, each judged row by row with intervals.

A claim holds in a row where the 95 % interval of what it says lies on its side of the line, fails where it lies on
the other, and is open where the interval has the line in it. The claims are those of He et al. 2026, arXiv 2603.24652,
which pruned layers and single weights of larger models; here neurons of a small one are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from readme_tables import markdown

Row = dict[str, Any]
HOLDS, FAILS, OPEN = "holds", "fails", "open"


def verdict(interval: Sequence[float] | None, line: float = 0.0) -> str:
    """Whether an interval lies above the line, below it, or across."""
    if interval is None:
        return OPEN
    low, high = interval
    return HOLDS if low > line else FAILS if high < line else OPEN


def number(found: dict[str, Any], pattern: str = "{:.3f}") -> str:
    """A mean, or a value, with its interval."""
    value = found.get("mean", found.get("value"))
    if value is None:
        return "-"
    interval = found.get("interval")
    if interval is None:
        return pattern.format(value)
    return f"{pattern.format(value)} ({pattern.format(interval[0])} to {pattern.format(interval[1])})"


def _apart(above: dict[str, Any], below: dict[str, Any], times: float) -> str:
    """Whether one mean is more than `times` another, by intervals that are apart."""
    if above["interval"] is None or below["interval"] is None:
        return OPEN
    if above["interval"][0] > times * below["interval"][1]:
        return HOLDS
    return FAILS if above["interval"][1] < times * below["interval"][0] else OPEN


def amplified(row: Row) -> tuple[str, list[str]]:
    """(a) 1 - cos of the probabilities is more than twice that of hidden states and of logits."""
    spaces = {name: row["hierarchy"][name]["cosine"] for name in ("embedding", "logits", "centred", "probabilities")}
    single = {_apart(spaces["probabilities"], spaces[name], 2.0) for name in ("embedding", "centred")}
    found = HOLDS if single == {HOLDS} else FAILS if FAILS in single else OPEN
    ratio = row["hierarchy"]["amplification"]
    shown = [number(spaces[name]) for name in spaces]
    return found, [*shown, *("-" if ratio[k] is None else f"{ratio[k]:.1f}" for k in ("exact", "estimate"))]


def accumulates(row: Row) -> tuple[str, list[str]]:
    """(b) after the same number of tokens, probabilities deviate more along the model's own text than along dense's."""
    found, shown = [], []
    for name in ("greedy", "sampled"):
        drift = row["drift"][name]
        found.append(verdict(drift["accumulated"]["probabilities"]["interval"]))
        shown += [number(drift["instantaneous"]["probabilities"]), number(drift["accumulated"]["probabilities"])]
        shown.append(number(drift["growth"]["probabilities"]))
    return found[0], shown  # greedy: sampling shows the same by other texts


def _categorical(row: Row) -> list[Row]:
    return [task for task in row["tasks"]["tasks"] if task["deviations"]]


def stable(row: Row) -> tuple[str, list[str]]:
    """(c) over the answer tokens alone, renormalised, probabilities deviate less than over the whole vocabulary."""
    found, shown = set(), []
    for task in _categorical(row):
        full, restricted = (task["deviations"][space]["total_variation"] for space in ("full", "restricted"))
        found.add(_apart(full, restricted, 1.0))
        shown += [number(full), number(restricted), number(task["metric"]["difference"], "{:.1%}")]
    return (HOLDS if found == {HOLDS} else FAILS if FAILS in found else OPEN), shown


def generation_first(row: Row) -> tuple[str, list[str]]:
    """(d) of what the dense model knows above chance, generation keeps a smaller share than choice by likelihood "
    "does."""
    tasks = {task["name"]: task for task in row["tasks"]["tasks"]}
    shown = []
    for name in ("choice", "generation", "retrieval"):
        metric = tasks[name]["metric"] if name in tasks else {}
        shown.append(number(metric["retained"], "{:.0%}") if metric.get("retained") else "-")
    pair = [order for order in row["tasks"]["orders"] if order["tasks"] == ["choice", "generation"]]
    if not pair:
        return OPEN, [*shown, "-"]
    return verdict(pair[0]["difference"]["interval"]), [*shown, number(pair[0]["difference"], "{:.0%}")]


@dataclass(frozen=True)
class Claim:
    """One claim: its words, the columns that bear on it, and the judge."""

    letter: str
    words: str
    rule: str
    columns: tuple[str, ...]
    judge: Callable[[Row], tuple[str, list[str]]]


CLAIMS = (
    Claim(
        "a",
        "Embedding and logit deviations stay small while probability deviation grows",
        "holds where 1 - cos of the probabilities is more than twice that of the hidden state in front of the LM "
        "head and "
        "of the centred logits, intervals apart. Amplification is the median over tokens of the ratio to the centred "
        "logits, measured and to second order.",
        (">hidden", ">logits", ">centred logits", ">probabilities", ">amplified", ">estimate"),
        amplified,
    ),
    Claim(
        "b",
        "Deviation accumulates over the steps of a generation",
        "holds where, over the last quarter of the steps of greedy text, 1 - cos of the probabilities is larger "
        "along the "
        "model's own text than along the dense model's. `growth` is what a single prediction's error gains from "
        "the first "
        "quarter to the last, on the dense model's text.",
        (">greedy, one step", ">accumulated", ">growth", ">sampled, one step", ">accumulated", ">growth"),
        accumulates,
    ),
    Claim(
        "c",
        "The categorical subspace stays stable",
        "holds where total variation over the answer tokens, renormalised, is smaller than over the whole "
        "vocabulary at "
        "the same position, intervals apart, for every task.",
        (),  # made from the tasks
        stable,
    ),
    Claim(
        "d",
        "Generation suffers before multiple choice",
        "holds where, on the same facts, generation retains a smaller share of what was above chance than multiple "
        "choice "
        "by length-normalised likelihood; the last column is choice minus generation, paired.",
        (">choice", ">generation", ">retrieval", ">choice - generation"),
        generation_first,
    ),
)


def _columns(claim: Claim, rows: Sequence[Row]) -> list[str]:
    if claim.columns:
        return list(claim.columns)
    names = [task["name"] for task in _categorical(rows[0])]
    return [f">{name}: {what}" for name in names for what in ("all tokens", "answers", "accuracy lost")]


def _section(claim: Claim, rows: Sequence[Row]) -> tuple[list[str], str]:
    judged = [(row, *claim.judge(row)) for row in rows]
    counts = {word: sum(found == word for _, found, _ in judged) for word in (HOLDS, FAILS, OPEN)}
    line = ", ".join(f"{word} in {count}" for word, count in counts.items() if count)
    cells = [[row["label"], f"{1 - row['kept']:.0%}", *shown, found] for row, found, shown in judged]
    body = markdown(["pruned by", ">removed", *_columns(claim, rows), "claim"], cells)
    summary = f"**({claim.letter}) {claim.words}:** {line} of {len(rows)} rows."
    return [
        f"## ({claim.letter}) {claim.words}",
        "",
        f"The claim {claim.rule}",
        "",
        f"{line} of {len(rows)} rows.",
        "",
        *body,
        "",
    ], summary


def document(facts: dict[str, Any]) -> str:
    """The whole of docs/findings.md."""
    rows = sorted(facts["rows"].values(), key=lambda row: (-row["keep"], row["label"]))
    settings, where = facts["settings"], facts["machine"]
    sections, summaries = zip(*(_section(claim, rows) for claim in CLAIMS), strict=True) if rows else ((), ())
    overview = [
        [
            row["label"],
            f"{1 - row['kept']:.1%}",
            f"{row['hierarchy']['perplexity']['pruned']:.2f}",
            number(row["hierarchy"]["probabilities"]["kl"]),
            number(row["hierarchy"]["probabilities"]["top1"], "{:.0%}"),
            str(row["drift"]["greedy"]["median_divergence"] or "never"),
            number(row["drift"]["greedy"]["repetition_difference"], "{:+.1%}"),
        ]
        for row in rows
    ]
    columns = [
        "pruned by",
        ">removed",
        ">perplexity",
        ">KL, nats",
        ">same top token",
        ">half have parted at",
        ">repetition",
    ]
    dense = f"{rows[0]['hierarchy']['perplexity']['dense']:.2f}" if rows else "-"
    calibration, text = settings["calibration"], settings["text"]
    lines = [
        "# What pruning does to a model",
        "",
        "Made by `python bench/bench_findings.py --show` from `bench/results/findings.json`; do not edit.",
        "",
        f"{settings['model']}, neurons removed in every FFN; calibrated on {calibration['tokens']:,} tokens of "
        f"{calibration['text']}, judged on {text['tokens']:,} of {text['text']} (dense perplexity {dense}, windows of "
        f"{text['window']}), {settings['budget']['prompts']} prompts, {settings['budget']['new_tokens']} new "
        f"tokens, and "
        f"the task files that ship. Intervals are 95 %, by bootstrap over windows, prompts or items. "
        f"{where['cpu']}, torch "
        f"{where['versions']['torch']}, Transformers {where['versions']['transformers']}, commit "
        f"{(where['commit'] or 'none')[:10]}, {where['date'][:10]}.",
        "",
        "The claims are those of He et al. 2026 (arXiv 2603.24652) on layers and single weights of larger models.",
        "",
        *(f"- {summary}" for summary in summaries),
        "",
        "## Overview",
        "",
        "`half have parted at`: the token at which half of the greedy texts differ from the dense model's. "
        "`repetition`: "
        "share of repeated 4-grams, pruned minus dense.",
        "",
        *markdown(columns, overview),
        "",
        *(line for section in sections for line in section),
    ]
    return "\n".join(lines).rstrip() + "\n"
