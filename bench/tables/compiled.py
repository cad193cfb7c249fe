"""The table of bench/model/compiled.py: decode steps by the recipe of docs/speed-cpu.md, beside those without."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, model_name, provenance


def compiled_table(result: dict[str, Any]) -> list[str]:
    """One row for each way to decode."""
    settings, rows = result["settings"], result["rows"]
    dense = rows[0]["tokens_per_s"]
    lines = []
    for row in rows:
        rate = row["tokens_per_s"]
        lines.append(
            [row["what"], f"{row['step_ms']['p50']:.1f}", f"{rate:.1f}", f"{rate / dense:.2f}x", f"{row['same']:.0%}"]
        )
    note = f"{settings['keep']:.0%} of the neurons, random ones, {settings['dtype']}, batch 1"
    return [
        f"{model_name(settings['model'])}, {note}, under `generate`, medians. {provenance(result)}",
        "",
        *markdown(
            ["FFN weights", ">ms a step", ">tokens/s", ">over dense", ">same tokens as before the recipe"], lines
        ),
    ]
