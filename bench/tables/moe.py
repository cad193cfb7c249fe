"""The tables of experts: at decode on a CPU (bench/cpu/moe.py), and on a GPU (bench/gpu/experts.py)."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, provenance

HEADER = (
    "experts",
    ">M",
    ">experts read",
    ">kept",
    "fastest of Transformers",
    ">us, all neurons",
    ">us, pruned",
    ">PrunedMoE, us",
    ">GB/s",
    ">of read",
    ">vs Transformers, all neurons",
    ">vs PrunedMoE, all neurons",
)
# (in words, the least, a row's value, whether of rows with all neurons; of others the value is times keep)
GOAL = ("keep 1: times as fast as the fastest of Transformers' ways", 1.5, "vs_transformers", True)
PRUNED_GOAL = ("pruned: times as fast as with all neurons, times keep", 0.9, "vs_keep_1", False)
# For more tokens arithmetic counts, and GB/s say little.
_FEW_TOKENS = 16


def cells(row: dict[str, Any]) -> list[str]:
    """A shape, a number of tokens and a share of neurons."""
    own, pruned, mine = row["transformers"], row["transformers_pruned"], row["pruned_moe"]
    name = f"{row['model']} {row['hidden_size']} x {row['intermediate_size']}, {row['picked']} of {row['experts']}"
    few = row["tokens"] <= _FEW_TOKENS
    return [
        name,
        str(row["tokens"]),
        f"{row['active']:.0f}",
        f"{row['keep']:.0%}",
        own["by"],
        f"{own['us']:,.0f}",
        "" if pruned is None else f"{pruned['p50']:,.0f}",
        f"{mine['us']:,.0f}" + ("" if mine["backend"] == "cpu" else f" ({mine['backend']})"),
        f"{row['gb_s']:.1f}" if few else "",
        f"{row['share_of_bandwidth']:.0%}" if few else "",
        f"{row['vs_transformers']:.2f}x",
        "" if row["keep"] == 1 else f"{row['vs_keep_1']:.2f}x",
    ]


def moe_table(result: dict[str, Any]) -> list[str]:
    """A line for each case and share of neurons, and the goals under them."""
    goals = [
        f"Goal, {g['goal']}: at least {g['limit']:g}; worst {g['worst']:.2f}, at {g['at']}"
        f"{'' if g['met'] else ': not met'}."
        for g in result["goals"]
    ]
    start = f"The experts of one layer, bfloat16, medians in us. {provenance(result)}"
    return [start, "", *markdown(HEADER, map(cells, result["rows"])), "", *goals]


def experts_table(result: dict[str, Any]) -> list[str]:
    """A line for each mixture, number of tokens and share of neurons on a GPU."""
    rows = []
    for row in result["rows"]:
        fastest, own = row["fastest"], row["fastest"]["default"]["us"]
        dense, pruned = fastest["dense"], fastest.get("pruned")
        few = row["tokens"] <= _FEW_TOKENS
        name = f"{row['model']} {row['hidden_size']} x {row['intermediate_size']}, {row['picked']} of {row['experts']}"
        rows.append(
            [
                name,
                str(row["tokens"]),
                f"{row['keep']:.0%}",
                f"{dense['us']:.1f} ({dense['by']})",
                f"{pruned['us']:.1f}" if pruned and row["keep"] < 1 else "",
                f"{own:.1f}",
                f"{row['floor_us']:.1f}",
                f"{row['floor_us'] / own:.0%}" if few else "",
                f"{dense['us'] / own:.2f}x",
                f"{pruned['us'] / own:.2f}x" if pruned and row["keep"] < 1 else "",
            ]
        )
    header = (
        "experts",
        ">M",
        ">kept",
        ">fastest of Transformers, all neurons, us",
        ">pruned, us",
        ">PrunedMoE, us",
        ">floor",
        ">of read",
        ">vs all neurons",
        ">vs pruned",
    )
    start = f"The experts of one layer, bfloat16, in a CUDA graph, medians. {provenance(result)}"
    return [start, "", *markdown(header, rows)]
