"""How the two models' texts part while they write."""

from __future__ import annotations

from typing import Any

from .facts import Facts
from .parts import Example, Figure, Section, Table, figure
from .plots import legend, line, mark, number_axis, percents
from .svg import DENSE, PRUNED, VIOLET, WARM
from .words import estimate, percent, plural, short, span

KINDS = {"greedy": "greedy", "sampled": "sampled"}
_COLOURS = {"greedy": PRUNED, "sampled": WARM}
_SHOWN = 320  # characters of a prompt


def _steps(kind: str, drift: dict[str, Any]) -> Figure:
    instant, more = (drift[key]["probabilities"] for key in ("instantaneous", "accumulated"))
    off = drift["exposure"]["probabilities"]
    change = "larger by" if (off["mean"] or 0.0) >= 0 else "different by"
    interval = more.get("interval")
    adds = (
        "adds" if interval and interval[0] > 0 else "takes off" if interval and interval[1] < 0 else "adds, if at all,"
    )
    caption = (
        f"On dense's own text the pruned model is {estimate(instant)} away at each token (1 - cos of probabilities); "
        f"by the last quarter of its text, its own history {adds} {short(abs(more['mean'] or 0.0))}{span(more)}, most "
        f"of it because the texts have parted: beside dense on its own text its error is {change} {estimate(off)}."
    )
    if kind == "sampled":
        caption = f"At temperature {drift['temperature']:g}, with common random numbers: o{caption[1:]}"

    def paint(axes: Any) -> None:
        numbers = [step["step"] for step in drift["steps"]]
        sides = (
            ("fixed", "both on dense's text", DENSE),
            ("local", "both on its own text", VIOLET),
            ("own", "each on its own text", _COLOURS[kind]),
        )
        for side, label, colour in sides:
            line(axes, numbers, [step[side]["probabilities"] for step in drift["steps"]], colour, label, marker="")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("1 - cos of probabilities")
        number_axis(axes, "token of the continuation", len(numbers))
        legend(axes)

    return figure(f"drift-{kind}", f"Step by step, {KINDS[kind]}", caption, paint)


def _survival(found: dict[str, Any]) -> Figure:
    parts = []
    for kind, drift in found.items():
        last, half = drift["survival"][-1], drift["median_divergence"]
        parted = f"half have parted at token {half}" if half else "fewer than half have parted"
        parts.append(
            f"{KINDS[kind]}, {parted} and {percent(last['mean'])} are still the same after {last['step']}"
            f"{span(last, percent)}"
        )
    caption = f"Of {plural(next(iter(found.values()))['prompts'], 'continuation')}: {'; '.join(parts)}."

    def paint(axes: Any) -> None:
        for kind, drift in found.items():
            steps = [0, *(entry["step"] for entry in drift["survival"])]
            entries = [{"mean": 1.0}, *drift["survival"]]
            line(axes, steps, entries, _COLOURS[kind], KINDS[kind], marker="", drawstyle="steps-post")
        mark(axes, 0.5, "half", "y")
        axes.set_ylim(0, 1.02)
        percents(axes)
        axes.set_ylabel("texts still the same")
        number_axis(axes, "token of the continuation", len(next(iter(found.values()))["survival"]))
        legend(axes)

    return figure("survival", "How long the texts stay the same", caption, paint)


def _table(found: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    for title, key in (
        ("single tokens shared", "overlap1"),
        ("bigrams shared", "overlap2"),
        ("4-grams shared", "overlap4"),
    ):
        rows.append((title, *(estimate(drift["agreement"][key], percent) for drift in found.values())))
    rows.append(("edit distance over length", *(estimate(d["agreement"]["edit"]) for d in found.values())))
    for title, key in (
        ("repeated 4-grams", "repetition"),
        ("distinct tokens", "distinct1"),
        ("distinct bigrams", "distinct2"),
    ):
        cells = (f"{percent(d['pruned'][key])} (dense {percent(d['dense'][key])})" for d in found.values())
        rows.append((title, *cells))
    rows.append(
        ("more repetition than dense", *(estimate(d["repetition_difference"], percent) for d in found.values()))
    )
    return Table("The texts themselves", ("measure", *(f">{KINDS[kind]}" for kind in found)), rows)


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _examples(found: dict[str, Any]) -> tuple[Example, ...]:
    shown = []
    for kind, drift in found.items():
        for entry in drift.get("examples", [])[:1]:
            same = _common(entry["dense"], entry["pruned"])
            prompt = entry["prompt"]
            tail = prompt if len(prompt) <= _SHOWN else f"…{prompt[-_SHOWN:]}"
            texts = entry["dense"][same:], entry["pruned"][same:]
            shown.append(Example(f"One prompt, {KINDS[kind]}", tail, entry["dense"][:same], *texts))
    return tuple(shown)


def section(facts: Facts) -> Section | None:
    """Generation drift; None where it was not looked at."""
    kinds = facts.part("diagnose", "drift") or {}
    found = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    if not found:
        return None
    first = next(iter(found.values()))
    lead = (
        f"Both models continue the same {plural(first['prompts'], 'prompt')} for up to {first['new_tokens']} tokens. "
        "What a pruned model does wrong at one token becomes its history at the next."
    )
    figures = tuple(_steps(kind, drift) for kind, drift in found.items())
    return Section("drift", "Generation", lead, (_survival(found), *figures), (_table(found),), _examples(found))
