"""The result as Markdown: a line for each method and keep, means over seeds with 95 % intervals, and the answers."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, provenance

from .answers import PERPLEXITY, UNIQUE, Run, cell, comparisons, correlations, groups, label, quality, shown, value
from .answers import ranges as ranges_of
from .correlation import LEAST
from .intervals import over_seeds
from .settings import DENSE

_DIGITS = {PERPLEXITY: 2, UNIQUE: 0}


def _words(found: dict[str, Any], metric: str, pattern: str) -> str:
    """`mean [low, high]`, or the mean alone where there is no interval."""
    mean, *ends = (pattern.format(shown(metric, found[k])) for k in ("mean", "low", "high") if found[k] is not None)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def interval(runs: list[Run], metric: str) -> str:
    """Mean over seeds with its interval, or the value of one seed."""
    if not runs:
        return "-"
    return _words(over_seeds([value(r, metric) for r in runs]), metric, f"{{:.{_DIGITS.get(metric, 1)}f}}")


def difference(found: dict[str, Any]) -> str:
    """Of one comparison: a difference with its sign, of perplexities a ratio."""
    return _words(found, found["metric"], "x{:.3f}" if found["metric"] == PERPLEXITY else "{:+.2f}")


def _sensitivity(runs: list[Run]) -> str:
    found = [r["redundancy"]["sensitivity"] for r in runs]
    return f"{sum(found) / len(found):.2e}" if found else "-"


def _cells(runs: list[Run], keep: float, method: str) -> list[str]:
    plain, distilled = (cell(runs, method, keep, flag) for flag in (False, True))
    return [
        f"{keep:.0%}",
        "dense, trained on" if method == DENSE else method,
        *(interval(side, metric) for metric in quality(runs) for side in (plain, distilled)),
        interval(plain, UNIQUE),
        _sensitivity(plain),
        str(len(plain)) if len(plain) == len(distilled) or not distilled else f"{len(plain)} + {len(distilled)}",
    ]


def _start_line(dense: dict[str, Any], runs: list[Run]) -> str:
    def words(name: str) -> str:
        found, digits = dense["metrics"][name], _DIGITS.get(name, 1)
        return f"{label(name)} {found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"

    recipe = runs[0]["recipe"]
    start = "steps from the model before it saw the task" if runs[0]["model"] == "smol" else "more"
    steps = f"{recipe['steps']} {start}"
    if "cooldown" in recipe:
        steps += f", the last {recipe['cooldown']:.0%} of them at the final share"
    return (
        f"{dense['task']}. The dense model after {dense['recipe']['dense_steps']} steps: "
        f"{', '.join(map(words, quality(runs)))} (95 % over {dense['inputs']} inputs). Each run: {steps}."
    )


def _spent(result: dict[str, Any]) -> str:
    """How much was run, where, and at which commits."""
    runs = result["runs"].values()
    hours = sum(run["seconds"]["train"] + run["seconds"]["evaluate"] for run in runs) / 3600
    commits = ", ".join(sorted({str(run["commit"])[:10] for run in runs if run.get("commit")}))
    cpus = sorted({run["cpu"] for run in runs if "cpu" in run})
    where = ", ".join(f"{sum(run.get('cpu') == cpu for run in runs)} on {cpu}" for cpu in cpus)
    spent = f"{len(runs)} runs" + (f" ({where})" if len(cpus) > 1 else "")
    return f"{spent}, {hours:.1f} hours of one process" + (f", at commit {commits}" if commits else "") + "."


def _judged(found: dict[str, Any]) -> str:
    cells = found["cells"]
    more, less = ("more", "fewer") if found["metric"] == UNIQUE else ("better", "worse")
    if found["low"] is None:
        return f"{difference(found)}: one seed"
    verdict = {"better": more, "worse": less}.get(found["verdict"], found["verdict"])
    words = f"{difference(found)}: {verdict}"
    if len(cells) == 1:
        return words
    count = [sum(c["verdict"] == word for c in cells) for word in ("better", "worse")]
    return f"{words} ({count[0]} {more}, {count[1]} {less} of {len(cells)})"


def _compared(found: list[dict[str, Any]], metrics: list[str]) -> list[str]:
    """A row for each comparison, a column for each metric."""
    rows: dict[str, dict[str, str]] = {}
    for entry in found:
        rows.setdefault(entry["what"], {})[entry["metric"]] = _judged(entry)
    units = [f">{label(metric)}, {'ratio' if metric == PERPLEXITY else 'difference'}" for metric in metrics]
    header = ["mean over cells, by seed", *units]
    return markdown(header, [[what, *(row.get(m, "-") for m in metrics)] for what, row in rows.items()])


def coefficient(found: dict[str, Any]) -> str:
    """`value [low, high]` of a correlation."""
    if found["value"] is None:
        return f"none from {found['n']} cells"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _explained(found: list[dict[str, Any]]) -> str:
    """What goes along with quality; nothing of too few cells."""
    if found[0]["all"]["n"] < LEAST:
        return ""
    words = [
        f"{label(entry['metric'])} with {'unique neurons' if entry['of'] == UNIQUE else entry['of']} "
        f"{coefficient(entry['all'])}, within a share kept {coefficient(entry['within'])}"
        for entry in found
    ]
    return (
        f"Rank correlation over {found[0]['all']['n']} cells, more being better (95 % by bootstrap over methods): "
        f"{'; '.join(words)}."
    )


def _narrowed(runs: list[Run]) -> str:
    words = []
    for metric in quality(runs):
        if found := ranges_of(runs, metric):
            each = (f"{r['keep']:.0%} kept {r['plain']:.2f} to {r['distilled']:.2f}" for r in found)
            words.append(f"{label(metric)}, {', '.join(each)}")
    if not words:
        return ""
    return f"Highest minus lowest method (perplexity: over the lowest), plain to distilled: {'; '.join(words)}."


def _refused(result: dict[str, Any], key: tuple[str, ...]) -> list[str]:
    """A line for each cell with runs that failed, with the first one's error."""
    cells: dict[tuple[Any, ...], list[Run]] = {}
    for run in result.get("failed", {}).values():
        if (run["task"], run["model"], run["size"]) == key:
            cells.setdefault((run["method"], run["keep"], run["distilled"]), []).append(run)
    return [
        f"- No result for {method} at {keep:.0%}{', distilled' if distilled else ''}, {len(runs)} runs: "
        f"{runs[0]['error']}."
        for (method, keep, distilled), runs in cells.items()
    ]


def finetune_table(result: dict[str, Any]) -> list[str]:
    """Lines for README: for each task and model a table of its runs and the answers they give."""
    lines = [f"{provenance(result)} {_spent(result)}"] if result["runs"] else ["Nothing was run yet."]
    compared, explained = comparisons(result), correlations(result)
    for key, runs in groups(result).items():
        metrics, dense = quality(runs), result["dense"].get("/".join(key))
        start = _start_line(dense, runs) if dense else ""
        lines += ["", f"**{', '.join(key)}.** {start}".strip(), ""]
        places = sorted({(-r["keep"], r["method"] != DENSE, r["method"]) for r in runs})
        header = [">kept", "method", *(f">{name}" for m in metrics for name in (label(m), "distilled"))]
        header += [f">{label(UNIQUE)}", ">sensitivity", ">seeds"]
        lines += markdown(header, [_cells(runs, -keep, method) for keep, _, method in places])
        if refused := _refused(result, key):
            lines += ["", *refused]
        own = [a for a in compared if (a["task"], a["model"], a["size"]) == key]
        if own:
            said = [a for a in explained if (a["task"], a["model"], a["size"]) == key]
            lines += ["", *_compared(own, [*metrics, UNIQUE])]
            words = f"{_explained(said)} {_narrowed(runs)}".strip()
            lines += ["", words] if words else []
    return lines
