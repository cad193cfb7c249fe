"""The main metric over the share of neurons that stays: a panel a task and model, a line a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pyprune.base.errors import check
from pyprune.base.files import new_file

from .answers import Run, cell, groups, label, main_metric, shown, value
from .intervals import over_seeds
from .settings import DENSE

# Of middle brightness, for the background is the reader's: light or dark.
_GREY = "#8a8f98"
_COLOURS = {"random": "#8a8f98", "magnitude": "#c08a2b", "movement": "#3d85c6", "gum": "#3aa17e", "l0": "#b565a7"}
_OTHERS = ("#d9534f", "#6a5acd")
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    "grid.color": _GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "pyprune",
}


def _line(axes: Any, runs: list[Run], metric: str, method: str, distilled: bool, colour: str, shift: float) -> None:
    keeps = [k for k in sorted({r["keep"] for r in runs}) if cell(runs, method, k, distilled)]
    if not keeps:
        return
    found = [over_seeds([value(r, metric) for r in cell(runs, method, keep, distilled)]) for keep in keeps]
    means, lows, highs = (
        [shown(metric, f["mean"] if f[k] is None else f[k]) for f in found] for k in ("mean", "low", "high")
    )
    errors = [[m - low for m, low in zip(means, lows, strict=True)], [h - m for m, h in zip(means, highs, strict=True)]]
    words = f"{method}, distilled" if distilled else method
    # A little apart: intervals at one place would hide each other.
    places = [keep + shift for keep in keeps]
    style = {"linestyle": "--" if distilled else "-", "marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1.3}
    axes.errorbar(places, means, yerr=errors, color=colour, label=words, elinewidth=0.8, **style)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw all runs of `result` into `path`, an SVG; bars are 95 % intervals over seeds.

    Raises:
        InputError: a result without runs.
    """
    panels = groups(result)
    check(bool(panels), "result", "hold runs", 0)
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(6.4, 4.8 * len(panels)), 4), layout="constrained")
        for axes, ((task, model, size), runs) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            metric = main_metric(runs)
            methods = sorted({r["method"] for r in runs} - {DENSE}, key=lambda m: (m not in _COLOURS, m))
            spare = iter(_OTHERS * 3)
            for number, method in enumerate(methods):
                colour = _COLOURS.get(method) or next(spare)
                for distilled in (False, True):
                    shift = 0.006 * (number - (len(methods) - 1) / 2) + (0.003 if distilled else 0)
                    _line(axes, runs, metric, method, distilled, colour, shift)
            if dense := cell(runs, DENSE, 1.0, False):
                mean = over_seeds([value(r, metric) for r in dense])["mean"]
                axes.axhline(shown(metric, mean), color=_GREY, linestyle=":", label="dense, trained on")
            axes.set_title(f"{task}, {model}, {size}", fontsize=10)
            axes.set_xlabel("share of neurons that stays")
            axes.set_ylabel(label(metric))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, frameon=False)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
