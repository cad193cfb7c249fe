"""The tables of docs/serving.md, from the result of bench/engines/run.py."""

from __future__ import annotations

from typing import Any

NAMES = {
    "dense": "dense",
    "uniform": "30 % removed, one width",
    "half": "50 % removed, widths differ",
    "differing": "30 % removed, widths differ",
    "deci": "the same, as DeciLM",
    "padded": "the same, padded",
    "llama-1b-half": "LLaMA 3.2 1B's shape, 50 % removed, random weights",
}


def engines_table(result: dict[str, Any]) -> list[str]:
    """A line for each model and engine: same texts and perplexity; and tokens a second where they were measured."""
    from .readme import markdown, provenance

    lines = []
    for row in result["agreement"]:
        engine = row["engine"]
        if "class" in row and ".transformers." in row["class"]:
            engine += ", Transformers backend"
        if row.get("asked"):
            engine += f", {' '.join(row['asked'].values())}"
        cells = [NAMES[row["model"]], engine, row["type"]]
        if "same" in row:
            lead = f"{max(row['leads']):.2f}" if row["leads"] else ""
            lines.append([*cells, f"{row['same']} of {row['of']}", lead, f"{row['perplexity']:.3f}"])
            lines[-1].append(f"{row['perplexity_ratio'] - 1:+.2%}")
        else:
            lines.append([*cells, "", "", f"{row['perplexity']:.3f}", ""])
    header = ("model", "engine", "type", ">same texts", ">lead at most", ">perplexity", ">over Transformers")
    found = [f"SmolLM2-135M-Instruct, dense and pruned. {provenance(result)}", "", *markdown(header, lines)]
    if result["speed"]:
        where = provenance({"machine": result.get("speed_machine", result["machine"])})
        found += ["", f"Speed, medians. {where}", "", *speed_lines(result["speed"])]
    return found


def speed_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens a second, over the dense model beside what its bytes allow, and over vLLM's own layers."""
    from .readme import markdown

    dense = {_case(row): row for row in rows if row["model"] == "dense"}
    own = {(row["model"], _case(row)): row for row in rows if row.get("kernels") == "off"}
    lines = []
    for row in rows:
        engine, kind, what, batch = _case(row)
        cells = [NAMES[row["model"]], engine, row.get("kernels", ""), kind, what, str(batch)]
        cells.append(f"{row['tokens_per_s']:,.0f}")
        over = dense.get(_case(row)) if row["model"] in ("uniform", "half", "differing") else None
        cells.append("" if over is None else f"{row['tokens_per_s'] / over['tokens_per_s']:.2f}x")
        bound = over is not None and what == "decode" and batch == 1 and row.get("kernels") != "int8"
        cells.append(f"{over['bytes'] / row['bytes']:.2f}x" if over is not None and bound else "")
        theirs = own.get((row["model"], _case(row))) if row.get("kernels") in ("auto", "int8") else None
        cells.append("" if theirs is None else f"{row['tokens_per_s'] / theirs['tokens_per_s']:.2f}x")
        lines.append(cells)
    names = ("model", "engine", "kernels", "type", "what")
    return markdown((*names, ">batch", ">tokens/s", ">over dense", ">by bytes", ">over vLLM's layers"), lines)


def _case(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["engine"], row["type"], row["what"], row["batch"]
