"""Figures from JSON facts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import check
from ..base.files import new_file
from ..evaluation.summary import Line, comparison_lines, judged_texts, perplexity_on
from ..speed.summary import Speed, speeds

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


# Of middle brightness, for the background is the reader's: light or dark.
_GREY, _OURS = "#8a8f98", "#3d85c6"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    "grid.color": _GREY,
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes
    "svg.hashsalt": "pyprune",  # the same names inside the file at every run
}
# Perplexities above this many times the dense model's leave the picture.
_TALLEST = 8.0


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted` and as near to it as that allows (least squares)."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Shifted by their rank, places only need not to decrease: pool neighbours that do, at their mean.
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        blocks.append((wanted[i] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    shifted = [value for value, count in blocks for _ in range(count)]
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = shifted[rank] + rank * gap
    return places


def compare_figure(result: dict[str, Any], path: str | Path) -> None:
    """Draw perplexity over the share of neurons removed, a line a setting, on the first text, or all of a suite.

    Args:
        result: as `comparison.Comparison.to_json` gives it.
        path: the SVG file.

    Raises:
        InputError: no row was measured.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = judged_texts(result)[0]
    lines, dense = comparison_lines(result, text), perplexity_on(result["dense"], text)
    check(bool(lines), "result", "have a row that was measured", len(result["rows"]))
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        removed = max(1 - point.kept for line in lines for point in line.points)
        top = min(_TALLEST * dense, 1.15 * max(point.perplexity for line in lines for point in line.points))
        axes.set_yscale("log")
        axes.set_xlim(0, removed)
        axes.set_ylim(0.94 * dense, top)
        scales = [10.0**power for power in range(int(math.log10(dense)), int(math.log10(top)) + 1)]
        ticks = [step * scale for scale in scales for step in (1, 1.5, 2, 3, 4, 6, 8) if dense < step * scale < top]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.axhline(dense, color=_GREY, linestyle=":")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for line in lines:
            _compare_line(axes, line, dense)
        _name_lines(axes, lines, dense)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
        axes.set_xlabel("share of FFN neurons removed")
        axes.set_ylabel("token perplexity (log)")
        axes.set_title(f"{result.get('model', 'model')} on {text}, one shot; dotted: dense", fontsize=9, pad=16)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})


def _way(line: Line, dense: float) -> list[tuple[float, float]]:
    """The points of a line, the dense model first."""
    return [(0.0, dense), *((1 - point.kept, point.perplexity) for point in line.points)]


def _compare_line(axes: Any, line: Line, dense: float) -> None:
    ours = line.group == "ours"
    colour, width = (_OURS, 2.5) if ours else (_GREY, 1.0)
    xs, ys = zip(*_way(line, dense), strict=True)
    style = "--" if line.group == "grid" else "-"
    axes.plot(xs, ys, style, color=colour, linewidth=width, zorder=2 + ours)
    shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= axes.get_ylim()[1]]
    axes.plot(*zip(*shown, strict=True), "o", color=colour, markersize=5 if ours else 2.5, clip_on=False, zorder=3)


def _name_lines(axes: Any, lines: Sequence[Line], dense: float) -> None:
    """Names to the right of the lines' ends; those of lines that leave the picture above where they do."""
    low, top = (math.log(limit) for limit in axes.get_ylim())
    right = axes.get_xlim()[1]
    ends, leaving = [], []
    for line in lines:
        way = [(x, math.log(y)) for x, y in _way(line, dense)]
        if way[-1][1] <= top:
            ends.append((line, (way[-1][0] / right, (way[-1][1] - low) / (top - low))))
            continue
        (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(way) if b[1] > top)
        leaving.append((line, (x0 + (x1 - x0) * (top - y0) / (y1 - y0)) / right))
    for (line, (x, end)), y in zip(ends, apart([y for _, (_, y) in ends], 0.048), strict=True):
        colour = _OURS if line.group == "ours" else _GREY
        axes.plot((x, 1.035), (end, y), color=colour, linewidth=0.5, transform=axes.transAxes, clip_on=False)
        _name(axes, line, (1.04, y), "left", "center")
    for (line, _), x in zip(leaving, apart([x for _, x in leaving], 0.16), strict=True):
        _name(axes, line, (x, 1.01), "center", "bottom")


def _name(axes: Any, line: Line, place: tuple[float, float], across: str, along: str) -> None:
    ours = line.group == "ours"
    axes.text(
        *place,
        line.label,
        transform=axes.transAxes,
        ha=across,
        va=along,
        fontsize=8,
        color=_OURS if ours else _GREY,
        weight="bold" if ours else "normal",
    )
