"""How many neurons each layer kept, and what their removal did to its output."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from .facts import Facts
from .parts import Figure, Section, figure
from .plots import legend, log_scale, number_axis
from .svg import DENSE, LINE, PRUNED
from .words import percent, plural, tick_percent

Width = tuple[int, int | None, int]


def layer_widths(facts: Facts) -> list[Width]:
    """`(layer, neurons before or None, neurons after)`; empty where no file says."""
    layers = facts.part("results", "prune", "layers")
    if layers:
        return [(entry["layer"], entry["before"], entry["after"]) for entry in layers]
    widths = facts.part("pyprune", "widths") or []
    dense = facts.part("redundancy", "redundancy", "layers") or []
    before = [entry["neurons"] for entry in dense]
    # The neurons that were looked at may have been those of another model, or of the pruned one itself.
    fits = len(before) == len(widths) and all(b >= w for b, w in zip(before, widths, strict=True)) and before != widths
    return [(i, before[i] if fits else None, width) for i, width in enumerate(widths)]


def _caption(widths: list[Width]) -> str:
    after = [a for _, _, a in widths]
    before = [b for _, b, _ in widths if b is not None]
    low, high = (choose(widths, key=lambda entry: entry[2]) for choose in (min, max))
    total = (
        f": {percent(sum(after) / sum(before))} of {sum(before):,} neurons" if before else f", {sum(after):,} in all"
    )
    if low[2] == high[2]:
        of = f" of {before[0]:,}" if before and len(set(before)) == 1 else ""
        return f"Each of the {plural(len(widths), 'layer')} keeps {low[2]:,}{of}{total}."
    return f"Layers keep from {low[2]:,} (layer {low[0]}) to {high[2]:,} (layer {high[0]}){total}."


def _widths(widths: list[Width]) -> Figure:
    def paint(axes: Any) -> None:
        numbers = [n for n, _, _ in widths]
        if all(b is not None for _, b, _ in widths):
            axes.bar(numbers, [b for _, b, _ in widths], 0.8, color=LINE, label="dense")
        axes.bar(numbers, [a for _, _, a in widths], 0.8, color=PRUNED, label="kept")
        axes.set_ylabel("neurons")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        number_axis(axes, "layer", len(widths))
        legend(axes)

    return figure("widths", "Neurons that stay, by layer", _caption(widths), paint)


def _errors(layers: list[dict[str, Any]]) -> Figure | None:
    cut = [e for e in layers if e.get("error_cut") is not None]
    repaired = [e for e in cut if e.get("error_repaired") is not None]
    if not cut:
        return None
    worst = max(cut, key=lambda e: e["error_cut"])
    caption = (
        f"Cutting neurons changes what an FFN puts out by {percent(fmean(e['error_cut'] for e in cut))} on average "
        f"(squared, relative), most in layer {worst['layer']} ({percent(worst['error_cut'])})"
    )
    if repaired:
        caption += f"; fitting what stays leaves {percent(fmean(e['error_repaired'] for e in repaired))}"

    def paint(axes: Any) -> None:
        lines = (("error_cut", cut, DENSE, "neurons cut"), ("error_repaired", repaired, PRUNED, "and repaired"))
        for key, entries, colour, label in lines:
            if entries:
                xs, ys = ([e[k] for e in entries] for k in ("layer", key))
                axes.plot(xs, ys, color=colour, marker="o", markersize=3.2, label=label)
        log_scale(axes, [e[key] for key, entries, _, _ in lines for e in entries], tick_percent)
        axes.set_ylabel("relative squared error")
        number_axis(axes, "layer", len(cut))
        legend(axes)

    return figure("repair", "Output error of each FFN", caption + ".", paint)


def section(facts: Facts) -> Section | None:
    """Widths and repair; None where no file tells them."""
    widths = layer_widths(facts)
    if not widths:
        return None
    errors = _errors(facts.part("results", "prune", "layers") or [])
    figures = (_widths(widths), *([errors] if errors else []))
    return Section("widths", "Widths", "How many FFN neurons each layer still has.", figures)
