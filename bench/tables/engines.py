"""The tables of docs/serving.md, from the result of bench/engines/run.py."""

from __future__ import annotations

from typing import Any

NAMES = {
    "dense": "dense",
    "uniform": "pruned, one width",
    "differing": "pruned, widths differ",
    "deci": "the same, as DeciLM",
    "padded": "the same, padded",
}


def engines_table(result: dict[str, Any]) -> list[str]:
    """A line for each model and engine: same texts and perplexity; and tokens a second where they were measured."""
    from .readme import markdown, provenance

    lines = []
    for row in result["agreement"]:
        engine = row["engine"]
        if "class" in row and ".transformers." in row["class"]:
            engine += ", Transformers backend"
        cells = [NAMES[row["model"]], engine, row["type"]]
        if "same" in row:
            lead = f"{max(row['leads']):.2f}" if row["leads"] else ""
            lines.append([*cells, f"{row['same']} of {row['of']}", lead, f"{row['perplexity']:.3f}"])
            lines[-1].append(f"{row['perplexity_ratio'] - 1:+.2%}")
        else:
            lines.append([*cells, "", "", f"{row['perplexity']:.3f}", ""])
    header = ("model", "engine", "type", ">same texts", ">lead at most", ">perplexity", ">over Transformers")
    found = [f"SmolLM2-135M-Instruct, dense and 30 % removed. {provenance(result)}", "", *markdown(header, lines)]
    if result["speed"]:
        dense = {_case(row): row["tokens_per_s"] for row in result["speed"] if row["model"] == "dense"}
        speeds = []
        for row in result["speed"]:
            ratio = row["tokens_per_s"] / dense[_case(row)]
            speeds.append([NAMES[row["model"]], *map(str, _case(row)), f"{row['tokens_per_s']:,.0f}", f"{ratio:.2f}x"])
        header = ("model", "engine", "type", "what", ">batch", ">tokens/s", ">over dense")
        found += ["", "Speed, medians.", "", *markdown(header, speeds)]
    return found


def _case(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["engine"], row["type"], row["what"], row["batch"]
