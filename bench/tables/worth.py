"""Is pruning worth it beside quantisation: the table of bench/model/worth.py's result, and its figure.

python -m bench.tables.worth            draws bench/results/worth.svg from bench/results/worth.json
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.tables.cpu_figure import _STYLE as STYLE
from bench.tables.readme import markdown, model_name
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.evaluation.intervals import bootstrap_mean_of_means

RESULTS = Path(__file__).parents[1] / "results"
Row = dict[str, Any]
ENGINES = {"pyprune": "Transformers with pyprune's kernels", "llama.cpp": "llama.cpp"}
# A line of the table: how it is called, and the format of each engine.
FORMATS = (("bf16", "bf16", "bf16"), ("8 bits", "int8", "q8_0"), ("4 bits", "int4", "q4_0"), ("5 bits", None, "q4_1"))
_COLOURS = {"bf16": "#3d85c6", "8 bits": "#3aa17e", "4 bits": "#c08a2b", "5 bits": "#a05fb4"}


def name_of(checkpoint: str) -> str:
    """What readers call a checkpoint."""
    kind, _, percent = checkpoint.partition("-")
    return "dense" if not percent else f"{percent} % removed" + (", recovered" if kind == "recovered" else "")


def over_dense(row: Row, dense: Row) -> tuple[float, tuple[float, float] | None]:
    """The geometric mean over domains of perplexity over the dense model's, and its 95 % interval by paired windows.

    A row whose engine tells of all windows together has no interval.
    """
    pairs = [(row["losses"][name], losses) for name, losses in dense["losses"].items()]
    ratio = math.exp(fmean(fmean(mine) - fmean(theirs) for mine, theirs in pairs))
    if row is dense or any(len(mine) != len(theirs) or len(mine) < 2 for mine, theirs in pairs):
        return ratio, None
    groups = [torch.tensor(mine).double() - torch.tensor(theirs).double() for mine, theirs in pairs]
    low, high = bootstrap_mean_of_means(groups)
    return ratio, (math.exp(low), math.exp(high))


def judged(result: Row) -> list[Row]:
    """Rows that were judged, with `ratio`, `interval` and `ms` (None for one that was not timed), and `best`: by bytes
    and by time, whether no row of the same engine is at least as good in both this and perplexity, and better in one.
    """
    rows = [row for row in result["rows"] if "losses" in row]
    names = ("checkpoint", "engine", "weights")
    dense = [row for row in rows if [row[n] for n in names] == ["dense", "pyprune", "bf16"]]
    check(bool(dense), "result", "hold dense in bf16 by pyprune, with which the others are compared", len(rows))
    found = []
    for row in rows:
        ratio, interval = over_dense(row, dense[0])
        ms = row["step_ms"]["p50"] if "step_ms" in row else None
        found.append({**row, "ratio": ratio, "interval": interval, "ms": ms})
    for row in found:
        rivals = [other for other in found if other["engine"] == row["engine"]]
        row["best"] = {axis: row[axis] is not None and not _beaten(row, rivals, axis) for axis in ("bytes", "ms")}
    return found


def _beaten(row: Row, rivals: list[Row], axis: str) -> bool:
    here = (row[axis], row["ratio"])
    there = [(other[axis], other["ratio"]) for other in rivals if other[axis] is not None]
    return any(x <= here[0] and y <= here[1] and (x, y) != here for x, y in there)


def _cells(row: Row | None) -> list[str]:
    """Megabytes, the FFNs' share of them, perplexity over dense, milliseconds, and how much faster than the anchor."""
    if row is None:
        return [""] * 5
    bold = {axis: "**" if best else "" for axis, best in row["best"].items()}
    interval = f" ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})" if row["interval"] else ""
    size = f"{bold['bytes']}{row['bytes'] / 1e6:.1f}{bold['bytes']}"
    cells = [size, f"{row['ffn_bytes'] / row['bytes']:.0%}", f"{row['ratio']:.3f}{interval}"]
    if row["ms"] is None:
        return [*cells, "", ""]
    return [*cells, f"{bold['ms']}{row['ms']:.1f}{bold['ms']}", f"{row['anchor_ms']['p50'] / row['ms']:.2f}x"]


def worth_table(result: Row) -> list[str]:
    """A line for each checkpoint and format, both engines beside each other."""
    rows = judged(result)
    by = {(row["checkpoint"], row["engine"], row["weights"]): row for row in rows}
    lines = []
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        for _, ours, theirs in FORMATS:
            pair = [by.get((checkpoint, "pyprune", ours)), by.get((checkpoint, "llama.cpp", theirs))]
            if any(pair):
                formats = [kind for kind, row in zip((ours, theirs), pair, strict=True) if row and kind]
                cells = [cell for row in pair for cell in _cells(row)]
                lines.append([name_of(checkpoint), " / ".join(dict.fromkeys(formats)), *cells])
    words = (">MB", ">in FFNs", ">over dense", ">ms a token", ">faster")
    header = ["model", "weights", *(f"{word}, {name}" for name in ("ours", "llama.cpp") for word in words)]
    told = [i for i in range(len(header)) if any(line[i] for line in lines)]  # an engine may not be measured yet
    header, lines = ([[line[i] for i in told] for line in part] for part in ([header], lines))
    timed = [f"{kind}: {' / '.join(_stamps(found))}." for kind, found in _measured(rows).items() if found]
    texts = result["texts"]
    return [
        f"{model_name(result['model'])}: perplexity over that of dense bf16, geometric mean of {len(texts['domains'])} "
        f"domains, {texts['tokens']} tokens of each in windows of {texts['window']}; megabytes of all weights; "
        "milliseconds of a decode step of one sequence, and how much faster than dense bf16 in the same engine, "
        "measured in turn. Bold: no other row of the engine is as small (as fast) at as low a perplexity. "
        f"{' '.join(timed)}",
        "",
        *markdown(header[0], lines),
        "",
        _made(rows),
    ]


def _measured(rows: list[Row]) -> dict[str, list[Row]]:
    return {
        "Perplexity": [row["judged"] for row in rows],
        "Time": [row["timed"] for row in rows if "timed" in row],
    }


def _stamps(found: list[Row]) -> list[str]:
    """CPU, threads, days and commits of rows, each kind of machine once."""
    kinds: dict[str, list[Row]] = {}
    for one in found:
        kinds.setdefault(f"{one['cpu']}, {one['torch_threads']} threads", []).append(one)
    told = []
    for kind, ones in kinds.items():
        days = sorted({one["date"][:10] for one in ones})
        commits = sorted({one["commit"][:10] + (" with changes" if one["dirty"] else "") for one in ones})
        told.append(f"{kind}, {' and '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits)}")
    return told


def _made(rows: list[Row]) -> str:
    """On how much text each checkpoint was fitted and taught."""
    told: dict[str, str] = {}
    for row in rows:
        made = row["made"]
        if made:
            text = f"{name_of(row['checkpoint'])}: {made['tokens']:,} tokens"
            taught = [f"{one['tokens']:,} in {one['steps']} steps" for one in made["recovery"]]
            told[row["checkpoint"]] = ", then taught on ".join([text, *taught])
    return f"Calibration. {'; '.join(told.values())}." if told else "Nothing was pruned."


def draw(result: Row, path: Path) -> None:
    """Perplexity over dense against megabytes and against milliseconds, a row of panels for each engine, an SVG."""
    rows = judged(result)
    engines = [engine for engine in ENGINES if any(row["engine"] == engine for row in rows)]
    axes_of = {"bytes": ("megabytes of weights", 1e-6), "ms": ("milliseconds a token, one sequence", 1.0)}
    axes_of = {axis: words for axis, words in axes_of.items() if any(row[axis] is not None for row in rows)}
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.6 + 3.4 * len(engines)), layout="constrained")
        panels = figure.subplots(len(engines), len(axes_of), squeeze=False, sharey=True)
        for engine, line in zip(engines, panels, strict=True):
            for axes, (axis, (label, scale)) in zip(line, axes_of.items(), strict=True):
                _panel(axes, [row for row in rows if row["engine"] == engine and row[axis] is not None], axis, scale)
                axes.set_title(ENGINES[engine], fontsize=9)
                axes.set_xlabel(label, fontsize=9)
                axes.set_xlim(left=0)
                axes.grid(alpha=0.3)
            line[0].set_ylabel("perplexity over dense bf16", fontsize=9)
            line[0].legend(fontsize=7, frameon=False)
        figure.suptitle(f"{model_name(result['model'])}: squares dense, circles pruned, stars recovered", fontsize=10)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})


def _panel(axes: Any, rows: list[Row], axis: str, scale: float) -> None:
    """The pruned checkpoints of each format as a line from the dense one, and the recovered ones beside it."""
    for name, *kinds in FORMATS:
        own = [row for row in rows if row["weights"] in kinds]
        if not own:
            continue
        plain = sorted((row for row in own if "recovered" not in row["checkpoint"]), key=lambda row: row["bytes"])
        taught = [row for row in own if "recovered" in row["checkpoint"]]
        colour = _COLOURS[name]
        label = {row["weights"] for row in own}.pop()
        axes.plot([scale * r[axis] for r in plain], [r["ratio"] for r in plain], color=colour, linewidth=1, label=label)
        groups = {"s": [r for r in plain if r["checkpoint"] == "dense"], "*": taught}
        groups["o"] = [r for r in plain if r["checkpoint"] != "dense"]
        for marker, points in groups.items():
            size = 80 if marker == "*" else 22
            axes.scatter([scale * r[axis] for r in points], [r["ratio"] for r in points], size, colour, marker=marker)
        for row in own:
            percent = row["checkpoint"].rpartition("-")[2]
            if percent in ("30", "50"):
                at = (scale * row[axis], row["ratio"])
                axes.annotate(percent, at, (4, 3), textcoords="offset points", fontsize=7, color=colour)


def main(
    result: Annotated[Path, typer.Option(help="The JSON of bench/model/worth.py.")] = RESULTS / "worth.json",
    out: Annotated[Path, typer.Option(help="The SVG file.")] = RESULTS / "worth.svg",
) -> None:
    """Draw the figure."""
    draw(json.loads(result.read_text(encoding="utf-8")), out)


if __name__ == "__main__":
    typer.run(main)
