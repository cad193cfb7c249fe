"""The table of widths by latency: what was promised, what was measured, and what it cost."""

from __future__ import annotations

from typing import Any

HEADER = ("target", ">promised", ">measured", ">off by", ">over plain", ">neurons kept", "widths", ">perplexity")


def latency_aware_rows(result: dict[str, Any]) -> list[list[str]]:
    """A line for each target; speed-ups are over the accelerated dense model, `over plain` over Transformers' own."""
    rows = []
    for row in result["rows"]:
        low, high = row["measured_spread"]["p10"], row["measured_spread"]["p90"]
        rows.append(
            [
                f"{row['target']:.2f}x",
                f"{row['promised']:.3f}x",
                f"{row['measured']:.3f}x ({low:.2f}..{high:.2f})",
                f"{row['measured'] / row['promised'] - 1:+.1%}",
                f"{row['over_plain']:.2f}x",
                f"{row['keep']:.1%}",
                f"{min(row['widths'])}..{max(row['widths'])}",
                f"{row['perplexity']:.2f}",
            ]
        )
    return rows


def latency_aware_summary(result: dict[str, Any]) -> str:
    """One line: what was timed, on what, beside the dense model."""
    load, table = result["table"]["workload"], result["table"]
    what = f"decode, {load['tokens']} at once" if load["kind"] == "decode" else f"prefill of {load['tokens']} tokens"
    weights = f", FFN weights in {load['weights']}" if load["weights"] else ""
    return (
        f"{result['model']}, {what}, {result['dtype']}{weights}: a step of the accelerated dense model takes "
        f"{1e3 * table['step']:.2f} ms, of the plain one {1e3 * table['plain']:.2f} ms; dense perplexity "
        f"{result['dense_perplexity']:.2f} ({result['evaluation']})."
    )


def latency_aware_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines for README."""
    from bench.tables.readme import markdown, provenance  # a sibling, which in turn names this file

    lines = markdown(HEADER, latency_aware_rows(result))
    return [f"{latency_aware_summary(result)} {provenance(result)}", "", *lines]
