"""Figures, as PNG files, from JSON facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .summary import Speed, speeds

_DENSE, _PRUNED, _FAST, _CEILING = "#8d99ae", "#2a6f97", "#2a9d6f", "#d62828"


def demo_figure(facts: dict[str, Any], path: Path) -> None:
    """Draw what the demo found: speed against its ceiling, quality and size, and where least squares repaired.

    Args:
        facts: as `demo.run_demo` writes them.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    speed, quality, repair = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.3))
    _speed_panel(speed, *(list(speeds(facts["bench"], name)) for name in ("pruned", "PrunedMLP")))
    _quality_panel(quality, facts["dense"], facts["pruned"])
    _repair_panel(repair, facts["prune"]["layers"])
    device = (facts["bench"]["machine"]["gpu"] or {}).get("name") or facts["bench"]["machine"]["cpu"]
    figure.suptitle(f"{facts['model']}: {1 - facts['keep']:.1%} of FFN neurons removed ({device})")
    figure.savefig(path, dpi=130, format="png")


def _speed_panel(axes: Any, pruned: list[Speed], fast: list[Speed]) -> None:
    places = range(len(pruned))
    shown = ((-0.2, pruned, _PRUNED, "pruned"), (0.2, fast, _FAST, "and accelerated"))
    for shift, entries, colour, label in shown:
        axes.bar([p + shift for p in places], [s.ratio for s in entries], 0.38, color=colour, label=label)
        for place, entry in zip(places, entries, strict=True):
            text = f"{entry.ratio:.2f}"
            axes.text(place + shift, 0.04, text, ha="center", va="bottom", fontsize=7, color="white", rotation=90)
    for place, entry in zip(places, pruned, strict=True):
        axes.hlines(entry.ceiling, place - 0.45, place + 0.45, color=_CEILING, label=None if place else "ceiling")
    axes.axhline(1.0, color=_DENSE, linewidth=1, linestyle="--", label="dense")
    axes.set_xticks(list(places), [s.what.replace(", ", "\n") for s in pruned], fontsize=7)
    axes.set_title("speed against dense, same run", fontsize=10)
    axes.set_ylabel("times as fast")
    axes.set_ylim(0, 1.25 * max(max(s.ratio, s.ceiling) for s in (*pruned, *fast)))
    axes.legend(fontsize=8, loc="upper left", ncols=4)


def _quality_panel(axes: Any, dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    labels = ("token\nperplexity", "file\n(100 MB)", "peak memory\n(100 MB)")
    scales = (("perplexity", 1.0), ("file_bytes", 1e8), ("peak_bytes", 1e8))
    for shift, (name, entry, colour) in enumerate((("dense", dense, _DENSE), ("pruned", pruned, _PRUNED))):
        heights = [entry[key] / scale for key, scale in scales]
        bars = axes.bar([i + 0.4 * shift for i in range(len(heights))], heights, 0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks([i + 0.2 for i in range(len(labels))], labels, fontsize=8)
    axes.set_title("quality and size (lower is better)", fontsize=10)
    axes.legend(fontsize=8)


def _repair_panel(axes: Any, layers: list[dict[str, Any]]) -> None:
    numbers = [entry["layer"] for entry in layers]
    axes.plot(numbers, [e["error_cut"] for e in layers], color=_DENSE, marker=".", label="neurons removed")
    axes.plot(numbers, [e["error_repaired"] for e in layers], color=_PRUNED, marker=".", label="and least squares")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_title("relative squared error of the FFN's output", fontsize=10)
    axes.legend(fontsize=8)
