"""The table of bench/experiments/allocations.py: perplexity on six domains by allocation, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.intervals import bootstrap_mean_of_means

Losses = dict[str, list[float]]
BASE = "uniform"


def ratio(losses: Losses, other: Losses) -> tuple[float, float, float]:
    """Geometric mean over domains of perplexity over that of `other`, with its 95 % interval over windows, paired."""
    groups: list[Tensor] = [
        torch.tensor(mine, dtype=torch.float64) - torch.tensor(other[name], dtype=torch.float64)
        for name, mine in losses.items()
    ]
    mean = math.fsum(float(group.mean()) for group in groups) / len(groups)
    low, high = bootstrap_mean_of_means(groups)
    return math.exp(mean), math.exp(low), math.exp(high)


def _shown(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


def predictor_table(result: dict[str, Any]) -> list[str]:
    """Lines for docs/quality.md: a row an allocation, the best of each share first."""
    if "dense" not in result["rows"]:
        return ["Nothing was run yet."]
    dense = result["rows"]["dense"]["losses"]
    rows = [row for name, row in result["rows"].items() if name != "dense"]
    lines = []
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        here = [row for row in rows if row["keep"] == keep]
        base = next(row for row in here if row["label"] == BASE)
        cells = []
        for row in here:
            single = [ratio({name: row["losses"][name]}, dense)[0] for name in dense]
            over = "" if row is base else _shown(ratio(row["losses"], base["losses"]))
            price = "" if row is base else f"{row['cpu_seconds'] - base['cpu_seconds']:.0f} s"
            whole = ratio(row["losses"], dense)
            shown = [_shown(whole), f"{max(single):.3f}", over, price, f"{row['cpu_seconds']:.0f} s"]
            cells.append((whole[0], [f"{1 - keep:.0%}", row["label"], *shown]))
        lines += [line for _, line in sorted(cells)]
    header = [">removed", "allocation", ">over dense", ">worst domain", ">over uniform"]
    header += [">allocation took, CPU time", ">pruning took, CPU time"]
    tokens = sum(part["tokens"] for part in result["calibration"])
    return [
        f"{model_name(result['model'])}, criterion `{result['method']}`, repair `{result['repair']}`, calibrated on "
        f"{tokens:,} tokens; {next(iter(result['domains'].values())):,} tokens of each of {len(result['domains'])} "
        f"domains, geometric mean of perplexities with its 95 % interval over windows. {provenance(result)}",
        "",
        *markdown(header, lines),
    ]
