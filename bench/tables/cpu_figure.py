"""Draw latency against keep ratio for one FFN, from the result of bench/cpu/run.py.

python -m bench.tables.cpu_figure            draws bench/results/cpu.svg from bench/results/cpu.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from pyprune.base.errors import check
from pyprune.base.files import new_file

RESULTS = Path(__file__).parents[1] / "results"
# Of middle brightness, for the background is the reader's: light or dark.
_GREY, _CEILING = "#8a8f98", "#d9534f"
_LINES = (
    ("torch-compact", "torch, kept neurons", "#c08a2b", "s"),
    ("gather", "pyprune gather", "#3aa17e", "^"),
    ("compact", "pyprune compact", "#3d85c6", "o"),
)
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    "grid.color": _GREY,
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes
    "svg.hashsalt": "pyprune",  # the same names inside the file at every run
}


def _points(rows: list[dict[str, Any]], variant: str) -> list[tuple[float, float]]:
    return [(row["keep"], row["variants"][variant]["us"]) for row in rows if variant in row["variants"]]


def draw(result: dict[str, Any], path: Path, model: str, weights: str) -> None:
    """Draw the rows of one model and dtype at M = 1 into `path`, an SVG."""
    rows = [r for r in result["rows"] if (r["model"], r["weights"], r["tokens"]) == (model, weights, 1)]
    rows.sort(key=lambda row: row["keep"])
    check(len(rows) > 1, "result", f"hold {model} in {weights} at M = 1 and two keeps at least", len(rows))
    keeps = [row["keep"] for row in rows]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        dense = sum(us for _, us in _points(rows, "dense")) / len(rows)
        axes.plot((0, 1), (dense, dense), color=_GREY, linestyle="--", label="torch, all neurons")
        for variant, label, colour, marker in _LINES:
            points = _points(rows, variant)
            if variant == "torch-compact":  # which is dense at keep 1.0
                points += [point for point in _points(rows, "dense") if point[0] == 1]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
        ceilings = [row["ceiling_us"] for row in rows]
        axes.plot(keeps, ceilings, color=_CEILING, linestyle=":", linewidth=2, label="bytes / read bandwidth")
        shape = f"{rows[0]['hidden_size']} x {rows[0]['intermediate_size']}"
        axes.set_title(f"one FFN of {model} ({shape}), {weights}, one token", fontsize=10)
        axes.set_xlabel("share of neurons that stay")
        axes.set_ylabel("microseconds, median")
        axes.set_xlim(0, 1.04)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})


def main(
    result: Annotated[Path, typer.Option(help="The JSON of bench/cpu/run.py.")] = RESULTS / "cpu.json",
    out: Annotated[Path, typer.Option(help="The SVG file.")] = RESULTS / "cpu.svg",
    model: Annotated[str, typer.Option(help="Of bench/shapes.py.")] = "llama-3.2-1b",
    weights: Annotated[str, typer.Option(help="Their dtype.")] = "bfloat16",
) -> None:
    """Draw the figure."""
    draw(json.loads(result.read_text(encoding="utf-8")), out, model, weights)


if __name__ == "__main__":
    typer.run(main)
