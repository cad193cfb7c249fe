"""README's one table: what a model loses and gains, from the results of three benches."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, model_name, provenance
from pyprune.evaluation.summary import MEAN, perplexity_on
from pyprune.speed.roofline import amdahl

# What is shown of `pyprune compare`, and how its texts are called.
_LABEL = "pyprune --best"
_TEXTS = {"wikipedia": "Wikipedia", MEAN: "mean of six domains"}


def _perplexities(compare: dict[str, Any], keep: float) -> dict[str, float]:
    """By text, of the row that is shown."""
    found: dict[str, float] = next(
        row["perplexity"] for row in compare["rows"] if (row["label"], row["keep"]) == (_LABEL, keep)
    )
    return found


def glance_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Four rows: dense, the same model accelerated, and 30 % and 50 % of its neurons removed.

    The ceiling is Amdahl's law over the share of a dense decode step that is spent in FFNs.
    """
    compare, nested = results["compare-suite"], results["nested"]
    share = results["model"]["rows"][0]["report"]["share"]["decode"]["1"]
    step = {row["share"]: row["decode_ms"]["p50"] for row in nested["rows"]}
    lines = []
    for name, keep in (("dense", None), ("the same, accelerated", 1.0), ("30 % removed", 0.7), ("50 % removed", 0.5)):
        removed = keep in (0.7, 0.5)
        found = _perplexities(compare, keep) if removed and keep else compare["dense"]
        words = [perplexity_on(found, text) for text in _TEXTS]
        speed = 1.0 if keep is None else nested["dense"]["decode_ms"]["p50"] / step[keep]
        most = f"{amdahl(share, 1 / keep):.2f}x" if keep and removed else ""
        lines.append([name, *(f"{word:.1f}" for word in words), f"{speed:.2f}x", most])
    header = ["SmolLM2-135M", *(f">perplexity, {name}" for name in _TEXTS.values()), ">decode speed", ">ceiling"]
    tokens = compare["calibration"]["tokens"]
    config = next(row["config"] for row in compare["rows"] if row["label"] == _LABEL)
    how = f"method {config['method']}, allocation {config['allocation']}, repair {config['compensate']}"
    return [
        *markdown(header, lines),
        "",
        f"Perplexity: {model_name(compare['model'])}, {how}; {tokens:,} tokens to calibrate on, {compare['text']}; of "
        f"these domains only Python's is like any of it, and none was trained on. Decode of one sequence in "
        f"{nested['dtype']}, measured apart, with as many neurons in every layer: {provenance(nested)}",
    ]
