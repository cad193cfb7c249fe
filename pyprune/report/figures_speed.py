"""Measured speed against the dense model, with what fewer neurons alone could give."""

from __future__ import annotations

from typing import Any

from ..speed.summary import Speed, speeds
from .facts import Facts
from .parts import Figure, Section, Table, figure
from .plots import ceilings, legend, mark
from .svg import DENSE, FAST, PAPER, PRUNED, VIOLET, WARM
from .words import clip, listed, percent, times

_COLOURS = (PRUNED, FAST, VIOLET, WARM)
# So many bars are wide enough for a number across.
_FLAT = 8
# As the demo names them -> as a reader does.
NAMES = {"pruned": "as saved", "PrunedMLP": "accelerated"}


def candidates(bench: dict[str, Any]) -> dict[str, list[Speed]]:
    """Model -> its measured speeds; the dense one left out."""
    return {name: list(speeds(bench, name)) for name in bench["models"] if name != "dense"}


def called(name: str) -> str:
    """A model's name in figures and sentences."""
    return clip(NAMES.get(name, name), 24)


def _bars(name: str, title: str, models: dict[str, list[Speed]]) -> Figure | None:
    kinds = [s.what for s in next(iter(models.values()), [])]
    if not kinds:
        return None
    told = []
    for i in dict.fromkeys((0, len(kinds) - 1)):
        ratios = " and ".join(f"{times(m[i].ratio)} ({called(model)})" for model, m in models.items())
        limits = sorted({times(m[i].ceiling) for m in models.values()})
        told.append(f"{kinds[i]}: {ratios}, where fewer neurons alone allow {' to '.join(limits)}")
    caption = "; ".join(told) + "."
    width = 0.8 / len(models)
    upright = 90 if len(kinds) * len(models) > _FLAT else 0

    def paint(axes: Any) -> None:
        highest = 1.0
        for turn, (model, measured) in enumerate(models.items()):
            places = [i + (turn - (len(models) - 1) / 2) * width for i in range(len(kinds))]
            axes.bar(places, [s.ratio for s in measured], 0.94 * width, color=_COLOURS[turn % 4], label=called(model))
            for place, speed in zip(places, measured, strict=True):
                axes.text(place, 0.05, f"{speed.ratio:.2f}", ha="center", va="bottom", rotation=upright, color=PAPER)
            limits = [s.ceiling for s in measured]
            ceilings(axes, places, limits, 0.94 * width, "ceiling" if turn == 0 else "_")
            highest = max(highest, *limits, *(s.ratio for s in measured))
        mark(axes, 1.0, "dense", "y", DENSE)
        axes.set_xticks(range(len(kinds)), [kind.replace("one FFN, ", "").replace(", ", "\n") for kind in kinds])
        axes.set_ylabel("times as fast as dense")
        axes.set_ylim(0, 1.08 * highest)
        axes.set_xlim(-0.6, max(len(kinds), 2) - 0.4)
        legend(axes)

    return figure(name, title, caption[0].upper() + caption[1:], paint)


def _table(bench: dict[str, Any], found: dict[str, list[Speed]]) -> Table:
    dense = list(speeds(bench, "dense"))
    rows = [
        (base.what, base.text, called(model), measured[i].text, times(measured[i].ratio), times(measured[i].ceiling))
        for i, base in enumerate(dense)
        for model, measured in found.items()
    ]
    return Table("Medians", ("what", ">dense", "model", ">speed", ">ratio", ">ceiling"), rows, folded=True)


def section(facts: Facts) -> Section | None:
    """Speed; None where nothing was timed."""
    bench = facts.bench
    found = candidates(bench) if bench is not None else {}
    if bench is None or not found:
        return None
    figures = (
        _bars("speed", "The whole model", {m: [s for s in every if "FFN" not in s.what] for m, every in found.items()}),
        _bars(
            "speed-ffn", "One FFN alone, for M tokens", {m: [s for s in e if "FFN" in s.what] for m, e in found.items()}
        ),
    )
    share = (bench.get("share") or {}).get("decode") or {}
    lead = "All models took turns in one run; a ratio is of medians, to the dense model's faster path."
    if share:
        batch = min(share, key=int)
        lead += f" FFNs take {percent(share[batch])} of the dense model's time at batch {batch}."
    keeps = sorted({percent(e["keep"]) for name, e in bench["models"].items() if name != "dense" and "keep" in e})
    if keeps:
        lead += f" Neurons kept: {listed(keeps)}."
    return Section("speed", "Speed", lead, tuple(f for f in figures if f is not None), (_table(bench, found),))
