"""README's tables of perplexity: of many ways to prune, and before and after recovery."""

from __future__ import annotations

import math
from typing import Any

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.summary import MEAN, Line, Point, comparison_lines, judged_texts, perplexity_on

Result = dict[str, Any]


def _mean(point: Point) -> str:
    spread = f" ({point.lowest:.2f} to {point.highest:.2f})" if point.seeds > 1 else ""
    return f"{point.perplexity:.2f}{spread}"


def _compare_cells(lines: list[Line], keeps: list[float]) -> list[list[str]]:
    """A row a setting of `pyprune compare`, the best at the smallest share kept first; ours in bold."""
    cells = []
    for line in lines:
        points = {point.keep: point for point in line.points}
        values = [_mean(points[keep]) if keep in points else "-" for keep in keeps]
        seeds = max(point.seeds for point in line.points)
        label = line.label if seeds == 1 else f"{line.label} ({seeds} seeds)"
        row = [label.replace("|", "/"), line.group, *values]
        if line.group == "ours":
            row = [f"**{cell}**" for cell in row]
        order = [-points[keep].perplexity if keep in points else -math.inf for keep in reversed(keeps)]
        cells.append((order, [*row, f"{max(point.seconds for point in line.points):.0f} s"]))
    return [row for _, row in sorted(cells, reverse=True)]


# What another sample of calibration text changes of the mean over domains (bench/notes/quality.md): a goal that is met
# or missed by less is not decided.
_NOISE = 0.03


def _compare_goal(goal: Result) -> str:
    if goal["met"] is None:
        return f"- {goal['text']}: ours at {1 - goal['our_keep']:.0%} removed: not measured"
    ours, published = goal["ours"], goal["published"]
    each = f" (and on {goal['domains_met']} of {goal['domains']} by itself)" if "domains" in goal else ""
    close = "domains" in goal and abs(math.log(ours["perplexity"] / published["perplexity"])) < _NOISE
    within = f", by less than the {_NOISE:.0%} that another calibration sample changes" if close else ""
    return (
        f"- {goal['text']}: {ours['label']} at {1 - goal['our_keep']:.0%} removed {ours['perplexity']:.2f}; best "
        f"published ({published['label']}) at {1 - goal['published_keep']:.0%} removed "
        f"{published['perplexity']:.2f}: {'met' if goal['met'] else 'not met'}{within}{each}"
    )


def _suite_lines(result: Result, keeps: list[float]) -> list[str]:
    """A table for each share kept: ratios to the dense model's perplexity, their mean and the worst first."""
    dense, asked = result["dense"], result["dense_tasks"]
    tokens = next(iter(result["evaluation"].values()))["tokens"]
    answers = f"PIQA {asked['piqa']['accuracy_byte']['value']:.1%} of {asked['piqa']['items']} questions by bytes, "
    repeats = f"{asked['generation']['repetition']['value']:.1%} of 4-grams repeated in answers to 32 prompts"
    values = ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
    out = ["", f"Perplexity over dense, {tokens} tokens of each domain. Dense: {values}; {answers}{repeats}."]
    header = ["setting", "group", ">kept", ">mean", ">worst", *(f">{n}" for n in dense), ">PIQA", ">repeats", ">took"]
    for keep in keeps:
        rows = []
        for row in (r for r in result["rows"] if r["keep"] == keep and "error" not in r):
            ratios = [row["perplexity"][name] / value for name, value in dense.items()]
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            shown = [f"{ratio:.3g}" if ratio >= 10 else f"{ratio:.3f}" for ratio in (mean, max(ratios), *ratios)]
            piqa, repeated = row["piqa"]["accuracy_byte"]["value"], row["generation"]["repetition"]["value"]
            took = row["prune_seconds"] + row.get("recovery", {}).get("seconds", 0.0)
            cells = [
                row["label"],
                row["group"],
                f"{row['kept']:.1%}",
                *shown,
                f"{piqa:.1%}",
                f"{repeated:.1%}",
                f"{took:.0f} s",
            ]
            rows.append((mean, [f"**{cell}**" for cell in cells] if row["group"] == "ours" else cells))
        out += ["", f"{1 - keep:.0%} of the neurons removed:", "", *markdown(header, [row for _, row in sorted(rows)])]
    return out


def compare_table(result: Result) -> list[str]:
    """The result of `pyprune compare`: for each text settings by share removed; what failed; the goals."""
    keeps = sorted({row["keep"] for row in result["rows"]}, reverse=True)
    commits = sorted({str(row["source"]["commit"])[:10] for row in result["rows"]})
    measured = f" Rows measured at commits {', '.join(commits)}." if len(commits) > 1 else ""
    calibration = f"{result['calibration']['tokens']} tokens of {result.get('text', 'the calibration text')}"
    out = [f"{model_name(result.get('model', 'model'))}, calibrated on {calibration}. {provenance(result)}{measured}"]
    header = ["setting", "group", *(f">{1 - keep:.0%} removed" for keep in keeps), ">pruning took"]
    if "suite" in result:
        out += _suite_lines(result, keeps)
    for text in [] if "suite" in result else judged_texts(result):
        dense = perplexity_on(result["dense"], text)
        cells = _compare_cells(comparison_lines(result, text), keeps)
        of = [entry["tokens"] for name, entry in result["evaluation"].items() if text in (name, MEAN)]
        tokens = sum(of)
        out += ["", f"Token perplexity on {tokens} tokens of {text}; dense {dense:.2f}.", "", *markdown(header, cells)]
    failed = [row for row in result["rows"] if "error" in row]
    if failed:
        out += ["", *(f"- no row: {r['label']} at {r['keep']}: {r['error']['message']}" for r in failed)]
    return [*out, "", "Goals.", "", *map(_compare_goal, result["goals"])]


# Of the suite's prompts, the ones whose answers are shown: every seventh, whatever was written.
SHOWN = range(0, 32, 7)
_LONGEST = 400


def _closed(pruned: float, recovered: float) -> str:
    """The share of what pruning lost, in log perplexity, that came back; of ratios to the dense model's."""
    return f"{1 - math.log(recovered) / math.log(pruned):.0%}" if pruned > 1 else "-"


def _wrote(models: Result, name: str) -> list[str]:
    generation = models[name]["generation"]
    low, high = generation["repetition"]["interval"]
    repeated = f"{generation['repetition']['value']:.1%} ({low:.1%} to {high:.1%})"
    piqa = models[name]["piqa"]
    answers = [piqa[key] for key in ("accuracy", "accuracy_byte")] if piqa else []
    right = [f"{a['value']:.1%} ({a['interval'][0]:.1%} to {a['interval'][1]:.1%})" for a in answers] or ["-", "-"]
    parameters = f"{models[name]['parameters']:,}"
    return [name, parameters, *right, repeated, f"{generation['distinct2']:.2f}", f"{generation['perplexity']:.2f}"]


def _samples(models: Result) -> list[str]:
    """The answers of all models to some prompts, one below the other."""
    out = []
    for number in SHOWN:
        out += ["", f"Prompt {number + 1}: {models['dense']['generation']['texts'][number]['prompt']}", ""]
        for name, found in models.items():
            text = " ".join(found["generation"]["texts"][number]["text"].split())
            cut = f"{text[:_LONGEST].rsplit(' ', 1)[0]} ..." if len(text) > _LONGEST else text
            out.append(f"- *{name}*: {cut}")
    return out


def recover_table(result: Result) -> list[str]:
    """The result of bench/model/recover.py: six domains, PIQA and writing, then answers."""
    models = result["models"]
    ratios = [models[name]["against"] for name in ("pruned", "recovered")]
    lines = []
    for domain, found in models["dense"]["domains"].items():
        pruned, recovered = (r["ratios"][domain]["value"] for r in ratios)
        lines.append([domain, f"{found['value']:.2f}", f"{pruned:.3f}", f"{recovered:.3f}", _closed(pruned, recovered)])
    pruned, recovered = (r["ratio"]["value"] for r in ratios)
    dense = f"{models['dense']['perplexity']['value']:.2f}"
    lines.append(["geometric mean", dense, f"{pruned:.3f}", f"{recovered:.3f}", _closed(pruned, recovered)])
    asked = ["model", ">parameters", ">PIQA", ">PIQA by bytes", ">repeated 4-grams", ">distinct-2", ">perplexity"]
    taught = "; ".join(f"{fact['tokens']:,} tokens, {fact['steps']} steps" for fact in result["recovery"])
    return [
        f"{model_name(result['model'])}, recovered on {taught}. {provenance(result)}",
        "",
        *markdown(["domain", ">dense", ">pruned, over dense", ">recovered, over dense", ">gap closed"], lines),
        "",
        "Intervals: 95 %. Repeated 4-grams, distinct-2 and perplexity (by dense) are of answers to 32 prompts.",
        "",
        *markdown(asked, [_wrote(models, name) for name in models]),
        *_samples(models),
    ]
