"""What the figures share: lines with bands, bars with a ceiling, scales that work for whatever was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .svg import LIMIT, LINE, SOFT
from .words import tick, tick_percent

# On a log scale, what is this far below the largest value is left out.
_DEPTH = 1e-4
# Of a legend, in points.
_WIDTH = 300.0
Entry = Mapping[str, Any] | None


def value_of(entry: Entry) -> float | None:
    """The mean of a summary, or the value of an estimate."""
    return None if entry is None else entry.get("mean", entry.get("value"))


def log_scale(axes: Any, values: Sequence[float | None], form: Callable[[float], str] = tick, along: str = "y") -> bool:
    """Make an axis logarithmic, with ticks of its own, where values above 0 allow it; whether it is."""
    above = [v for v in values if v is not None and v > 0]
    if not above:
        return False
    top = max(above)
    low = max(min(above), top * _DEPTH)
    low, top = low / 1.25, top * 1.25
    getattr(axes, f"set_{along}scale")("log")
    getattr(axes, f"set_{along}lim")(low, top)
    ticks = _log_ticks(low, top)
    getattr(axes, f"set_{along}ticks")(ticks, [form(tick) for tick in ticks])
    getattr(axes, f"set_{along}ticks")([], minor=True)
    return True


def _log_ticks(low: float, top: float) -> list[float]:
    """Four to eight round numbers."""
    decades = math.log10(top / low)
    steps = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2.2 else (1,)
    every = max(1, math.ceil(decades / 6))
    powers = [p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(top)) + 1) if p % every == 0]
    return [tick for p in powers for s in steps if low <= (tick := float(f"{s}e{p}")) <= top]


def percents(axes: Any, along: str = "y") -> None:
    """Label an axis with shares."""
    getattr(axes, f"{along}axis").set_major_formatter(lambda value, place: tick_percent(value))


def number_axis(axes: Any, label: str, last: int) -> None:
    """A horizontal axis of layers or steps, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.margins(x=0.02 if last > 3 else 0.1)


def line(axes: Any, xs: Sequence[float], entries: Sequence[Entry], colour: str, label: str, **style: Any) -> None:
    """Means over a number, with their intervals as a band; gaps where there is no value."""
    known = [(x, e, v) for x, e in zip(xs, entries, strict=True) if e is not None and (v := value_of(e)) is not None]
    if not known:
        return
    places, means = [x for x, _, _ in known], [v for _, _, v in known]
    marker = {"marker": "o"} if len(known) <= 40 else {}
    axes.plot(places, means, color=colour, label=label, **{**marker, "markersize": 3.2, **style})
    banded = [(x, e["interval"]) for x, e, _ in known if e.get("interval")]
    if banded:
        bounds = [[interval[i] for _, interval in banded] for i in (0, 1)]
        axes.fill_between([x for x, _ in banded], *bounds, color=colour, alpha=0.18, linewidth=0)


def dot(axes: Any, entry: Entry, y: float, colour: str, label: str | None = None, **style: Any) -> None:
    """A value and its interval on a horizontal axis."""
    value = value_of(entry)
    if entry is None or value is None:
        return
    if entry.get("interval"):
        axes.plot(entry["interval"], (y, y), color=colour, linewidth=2.4, alpha=0.55, solid_capstyle="butt")
    axes.plot(value, y, color=colour, label=label, **{"marker": "o", "linestyle": "none", "markersize": 6, **style})


def mark(axes: Any, value: float, text: str, along: str = "x", colour: str = SOFT) -> None:
    """A dashed line at a value, named in the legend."""
    paint = axes.axvline if along == "x" else axes.axhline
    paint(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.3, label=text, zorder=1.5)


def rows(axes: Any, names: Sequence[str]) -> None:
    """Names down the vertical axis, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def legend(axes: Any) -> None:
    """Above the picture, so that it hides nothing; in as many lines as it takes."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        # Of a sign and a letter, in points.
        wide = [26 + 5.6 * len(label) for label in labels]
        fitting = [
            n
            for n in range(len(labels), 1, -1)
            if n * max(wide) <= _WIDTH or (n == len(labels) and sum(wide) <= _WIDTH)
        ]
        columns = fitting[0] if fitting else 1
        axes.figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.5
        )


def ceilings(axes: Any, places: Sequence[float], values: Sequence[float], width: float, label: str) -> None:
    """Short lines that bars could reach."""
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        name = None if i else label
        axes.hlines(value, place - width / 2, place + width / 2, color=LIMIT, linewidth=2, label=name, zorder=3)


def rail(axes: Any, y: float, low: float, high: float) -> None:
    """A thin line between two dots of a row."""
    axes.plot((low, high), (y, y), color=LINE, linewidth=2, zorder=1)


def shares_up_to_one(axes: Any, shares: Sequence[float]) -> None:
    """A vertical axis of shares that may all be 1."""
    low = min(shares)
    bottom = max(0.0, min(0.9, low - 0.1 * (1 - low)))
    axes.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    percents(axes)


def height(count: int) -> tuple[float, float]:
    """The size of a figure with so many rows."""
    return 4.5, max(2.2, 1.0 + 0.36 * count)
