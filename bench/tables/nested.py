"""README's table of nested widths, from the result of bench/model/nested.py."""

from __future__ import annotations

from typing import Any


def nested_table(result: dict[str, Any]) -> list[str]:
    """A line for each share: perplexity with and without compensated rows, latency, and what that is over dense."""
    dense = result["dense"]
    header = (
        "| neurons | perplexity, prefix | perplexity, compensated | decode, ms a token | over dense | prefill, ms |"
    )
    lines = [f"{header} over dense |", "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]

    def line(name: str, prefix: float, own: float | None, decode: float, prefill: float) -> str:
        ratios = dense["decode_ms"]["p50"] / decode, dense["prefill_ms"]["p50"] / prefill
        cells = (name, f"{prefix:.2f}", "" if own is None else f"{own:.2f}", f"{decode:.2f}", f"{ratios[0]:.2f}")
        return "| " + " | ".join([*cells, f"{prefill:.1f}", f"{ratios[1]:.2f}"]) + " |"

    lines.append(line("dense, torch", dense["perplexity"], None, dense["decode_ms"]["p50"], dense["prefill_ms"]["p50"]))
    for row in result["rows"]:
        times = row["decode_ms"]["p50"], row["prefill_ms"]["p50"]
        lines.append(line(f"{row['share']:.0%}", row["perplexity"], row["perplexity_compensated"], *times))
    return lines


def nested_caption(result: dict[str, Any]) -> str:
    """What the table's numbers are of, in one line."""
    switch = max(row["switch_ms"] for row in result["rows"])
    own = max((row["switch_compensated_ms"] or 0.0 for row in result["rows"]), default=0.0)
    return (
        f"{result['model']} in {result['dtype']}, all widths from one checkpoint ({result['method']}), "
        f"{result['evaluation']}, {result['evaluation_tokens']} tokens; one sequence, prefill of "
        f"{result['prefill_tokens']} tokens, medians. Another width takes at most {switch:.1f} ms, with compensated "
        f"rows {own:.0f} ms."
    )
