"""No repair."""

from __future__ import annotations

from dataclasses import dataclass

from .base import REPAIRS, Fitted, Layer, Repair


@REPAIRS.add
@dataclass(frozen=True, kw_only=True)
class NoRepair(Repair):
    """Kept neurons stay as they are; `repair=None` means this."""

    NAME = "none"
    SUMMARY = "kept neurons stay as they are"
    STRUCTURES = frozenset({"ffn", "layer", "experts"})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def fit(self, layer: Layer) -> Fitted:
        return Fitted()
