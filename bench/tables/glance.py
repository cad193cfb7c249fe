"""README's one table: what a model loses and gains, from the results of three benches."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.summary import MEAN, perplexity_on
from pyprune.speed.roofline import amdahl

# What is shown of `pyprune compare`: name, its setting, share kept; and how its texts are called.
_ROWS = (
    ("dense", None, None),
    ("the same, accelerated", None, 1.0),
    ("30 % removed", "pyprune", 0.7),
    ("30 % removed, recovered", "pyprune --best", 0.7),
    ("50 % removed, recovered", "pyprune --best", 0.5),
)
_TEXTS = {"wikipedia": "Wikipedia", MEAN: "mean of six domains"}


def _row(compare: dict[str, Any], label: str, keep: float | None) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in compare["rows"] if (row["label"], row["keep"]) == (label, keep))
    return found


def glance_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Dense, the same model accelerated, and 30 % and 50 % of its neurons removed.

    The ceiling is Amdahl's law over the share of a dense decode step that is spent in FFNs.
    """
    compare, nested = results["compare-suite"], results["nested"]
    share = results["model"]["rows"][0]["report"]["share"]["decode"]["1"]
    step = {row["share"]: row["decode_ms"]["p50"] for row in nested["rows"]}
    lines = []
    for name, label, keep in _ROWS:
        found = _row(compare, label, keep)["perplexity"] if label else compare["dense"]
        words = [perplexity_on(found, text) for text in _TEXTS]
        speed = 1.0 if keep is None else nested["dense"]["decode_ms"]["p50"] / step[keep]
        most = f"{amdahl(share, 1 / keep):.2f}x" if keep and label else ""
        lines.append([name, *(f"{word:.1f}" for word in words), f"{speed:.2f}x", most])
    header = ["SmolLM2-135M", *(f">perplexity, {name}" for name in _TEXTS.values()), ">decode speed", ">ceiling"]
    config = _row(compare, *_ROWS[2][1:])["config"]
    how = f"method {config['method']}, allocation {config['allocation']}, repair {config['compensate']}"
    taught = _row(compare, *_ROWS[3][1:])["recovery"]
    return [
        *markdown(header, lines),
        "",
        f"Perplexity: {model_name(compare['model'])}, {how}; what is read is {compare['text']}; of these domains only "
        f"Python's is like any of it. Recovered: taught by the dense model on {taught['tokens']:,} tokens, most "
        "of them another text that it wrote. "
        f"Decode of one sequence in {nested['dtype']}, measured apart, with as many neurons in every layer: "
        f"{provenance(nested)}",
    ]
