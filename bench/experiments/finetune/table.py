"""The result as Markdown: a line for each method and keep, means over seeds with 95 % intervals, and the answers."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, provenance

from .answers import PERPLEXITY, UNIQUE, Run, answers, cell, groups, label, main_metric, value
from .intervals import over_seeds
from .settings import DENSE


def interval(values: list[float], digits: int) -> str:
    """`mean [low, high]`, or the value of one seed."""
    if not values:
        return "-"
    found = over_seeds(values)
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["low"] is None else f"{mean} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _sensitivity(runs: list[Run]) -> str:
    found = [r["redundancy"]["sensitivity"] for r in runs]
    return f"{sum(found) / len(found):.2e}" if found else "-"


def _cells(runs: list[Run], keep: float, method: str, metric: str) -> list[str]:
    plain, distilled = (cell(runs, method, keep, flag) for flag in (False, True))
    return [
        f"{keep:.0%}",
        "dense, trained on" if method == DENSE else method,
        interval([value(r, metric) for r in plain], 1),
        interval([value(r, metric) for r in distilled], 1),
        interval([value(r, PERPLEXITY) for r in plain], 2),
        interval([value(r, PERPLEXITY) for r in distilled], 2),
        interval([value(r, UNIQUE) for r in plain], 0),
        _sensitivity(plain),
        str(len(plain)) if len(plain) == len(distilled) or not distilled else f"{len(plain)} + {len(distilled)}",
    ]


def _start_line(dense: dict[str, Any], metric: str, steps: list[int]) -> str:
    def shown(name: str, digits: int) -> str:
        found = dense["metrics"][name]
        return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"

    return (
        f"{dense['task']}. The dense model after {dense['recipe']['dense_steps']} steps: {label(metric)} "
        f"{shown(metric, 1)}, perplexity {shown(PERPLEXITY, 2)} (95 % over {dense['inputs']} inputs). Each run: "
        f"{' or '.join(map(str, steps))} more steps."
    )


def _spent(result: dict[str, Any]) -> str:
    """How much was run, and at which commits."""
    runs = result["runs"].values()
    hours = sum(run["seconds"]["train"] + run["seconds"]["evaluate"] for run in runs) / 3600
    commits = ", ".join(sorted({str(run["commit"])[:10] for run in runs if run.get("commit")}))
    return f"{len(runs)} runs, {hours:.1f} hours of one process" + (f", at commit {commits}" if commits else "") + "."


def finetune_table(result: dict[str, Any]) -> list[str]:
    """Lines for README: for each task and model a table of its runs and the answers they give."""
    lines = [f"{provenance(result)} {_spent(result)}"] if result["runs"] else ["Nothing was run yet."]
    said = answers(result)
    for (task, model, size), runs in groups(result).items():
        metric, dense = main_metric(runs), result["dense"].get(f"{task}/{model}/{size}")
        steps = sorted({run["recipe"]["steps"] for run in runs})
        start = _start_line(dense, metric, steps) if dense else ""
        lines += ["", f"**{task}, {model}, {size}.** {start}".strip(), ""]
        places = sorted({(-r["keep"], r["method"] != DENSE, r["method"]) for r in runs})
        header = [">kept", "method", f">{label(metric)}", ">distilled", ">perplexity", ">distilled "]
        header += [f">{label(UNIQUE)}", ">sensitivity", ">seeds"]
        lines += markdown(header, [_cells(runs, -keep, method, metric) for keep, _, method in places])
        own = [a["sentence"] for a in said if (a["task"], a["model"], a["size"]) == (task, model, size)]
        lines += ["", *(f"- {sentence}" for sentence in own)] if own else []
    return lines
