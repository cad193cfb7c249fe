"""What removing neurons can gain in an engine: Amdahl's law with the FFNs' share of the time that was measured there.

The share comes from a third checkpoint of the same model, whose FFNs have next to no neurons, in the same run. Time is
taken to be linear in the neurons between that one and the dense one, so r of the neurons removed leaves 1 - r * share
of the dense model's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

LEAST = "least"
LEAST_NEURONS = 32  # an FFN: one block of llama.cpp's quantised types


def neurons(folder: Path) -> int:
    """Of all FFNs of a LLaMA-shaped checkpoint together."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith(".mlp.down_proj.weight")]  # noqa: SIM118
        return sum(file.get_slice(name).get_shape()[1] for name in names)


def case_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """What two rows must have in common to be compared."""
    return row["engine"], row["type"], row["what"], row["batch"]


def add_ceilings(rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Add to each pruned model's row, by the engine's own layers, how it compares with what it could be.

    Args:
        rows: with `model`, `engine`, `type`, `what`, `batch`, `neurons`, `tokens_per_s` and, where there is a choice,
            `kernels`. Added where the same case was measured with the dense model and with `LEAST`: `speedup` over the
            dense model, `removed` (share of the neurons), `ffn_share` (of the dense model's time), `ceiling` (of the
            speed-up) and `of_ceiling`.
        names: of the pruned models, which were the dense one.
    """
    own = [row for row in rows if row.get("kernels", "off") == "off"]
    dense, least = ({case_of(row): row for row in own if row["model"] == name} for name in ("dense", LEAST))
    for row in own:
        whole, none = dense.get(case_of(row)), least.get(case_of(row))
        if row["model"] not in names or whole is None or none is None:
            continue
        share = (1 - whole["tokens_per_s"] / none["tokens_per_s"]) / (1 - none["neurons"] / whole["neurons"])
        removed = 1 - row["neurons"] / whole["neurons"]
        speedup, ceiling = row["tokens_per_s"] / whole["tokens_per_s"], 1 / (1 - removed * share)
        row |= {"speedup": speedup, "removed": removed, "ffn_share": share}
        row |= {"ceiling": ceiling, "of_ceiling": speedup / ceiling}
