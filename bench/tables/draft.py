"""The table of pruned models as drafts, from the result of bench/model/draft.py."""

from __future__ import annotations

from typing import Any


def draft_table(result: dict[str, Any]) -> list[str]:
    """A line for each draft: what it predicts, what that saves in steps, and in time where it was measured."""
    from .readme import markdown, provenance

    settings = result["settings"]
    header = ["draft", ">tokens predicted", ">tokens a step"]
    rates = all("tokens_per_s_drafted" in row for row in result["rows"])
    if rates:
        header += [">dense, tokens/s", ">draft, tokens/s", ">together, tokens/s", ">over dense"]
    lines = []
    for row in result["rows"]:
        cells = [row["draft"], f"{row['match']:.0%}", f"{row['per_step']:.2f}"]
        if rates:
            alone, drafted = row["tokens_per_s_alone"], row["tokens_per_s_drafted"]
            found = (alone, row["tokens_per_s_draft"], drafted)
            cells += [*(f"{rate:.1f}" for rate in found), f"{drafted / alone:.2f}x"]
        lines.append(cells)
    many, new, drafted = (settings[key] for key in ("prompts", "new_tokens", "drafted"))
    start = (
        f"SmolLM2-135M-Instruct in {settings['dtype']}, {many} texts of {new} tokens, {drafted} tokens drafted for "
        f"each step of the dense model. {provenance(result)}"
    )
    return [start, "", *markdown(header, lines)]
