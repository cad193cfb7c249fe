"""How to distil."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..base.errors import check, is_finite


@dataclass(frozen=True)
class DistillationConfig:
    """How to distil.

    Attributes:
        temperature: T, above 0.
        kl_weight, ce_weight, hidden_weight: of the three parts, 0 or more, one of them above 0.
        layers: numbers of the decoder layers whose outputs the hidden part compares, of the last one after the final
            norm; None for all of them.

    Raises:
        InputError: a value breaks its rule.
    """

    temperature: float = 2.0
    kl_weight: float = 0.5
    ce_weight: float = 0.5
    hidden_weight: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive = is_finite(self.temperature) and self.temperature > 0
        check(positive, "temperature", "be positive and finite", self.temperature)
        for name in ("kl_weight", "ce_weight", "hidden_weight"):
            value = getattr(self, name)
            check(is_finite(value) and value >= 0, name, "be 0 or more, and finite", value)
        weights = self.kl_weight, self.ce_weight, self.hidden_weight
        check(any(weights), "kl_weight, ce_weight and hidden_weight", "not all be 0", weights)
        if self.layers is not None:
            counts = [isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.layers]
            check(bool(counts) and all(counts), "layers", "be numbers of decoder layers", self.layers)
            check(self.hidden_weight > 0, "layers", "be given only with a hidden_weight above 0", self.layers)
            object.__setattr__(self, "layers", tuple(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "layers": None if self.layers is None else list(self.layers)}
