"""What the user chooses for pruning: frozen, and validated when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import importance
from .errors import check, check_choice

SCOPES = ("layer", "global")
COMPENSATIONS = ("none", "bias", "least-squares")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class PruneConfig:
    """How to prune.

    Attributes:
        keep: share of neurons that stays, in (0, 1].
        method: a criterion's name (`pyprune.importance.names()`).
        scope: `layer` keeps the same share in every layer, `global` compares neurons of all layers by their
            standardised scores, so widths differ by layer.
        multiple: widths are rounded to multiples of this, to the nearest; never below one multiple or above F.
        floor: with scope `global`, the least share of neurons that any layer keeps, in [0, 1].
        compensate: `none`; `bias` adds the mean contribution of the removed neurons to the down bias;
            `least-squares` refits the down projection of the kept neurons to the dense output.
        damping: ridge of the least-squares fit, as a share of the mean diagonal of the activations' second moment.
        seed: of everything random.

    Raises:
        InputError: a value breaks its rule.
    """

    keep: float = 0.7
    method: str = "wanda"
    scope: str = "layer"
    multiple: int = 64
    floor: float = 0.0
    compensate: str = "least-squares"
    damping: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check(_is_number(self.keep) and 0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        importance.get(self.method)
        check_choice(self.scope, "scope", SCOPES)
        check_choice(self.compensate, "compensate", COMPENSATIONS)
        check(isinstance(self.multiple, int) and self.multiple >= 1, "multiple", "be a positive integer", self.multiple)
        check(_is_number(self.floor) and 0 <= self.floor <= 1, "floor", "lie in [0, 1]", self.floor)
        fits = self.scope != "global" or self.floor <= self.keep
        check(fits, "floor", f"be at most keep ({self.keep})", self.floor)
        positive = _is_number(self.damping) and 0 < self.damping < float("inf")
        check(positive, "damping", "be positive and finite", self.damping)
        check(isinstance(self.seed, int) and self.seed >= 0, "seed", "be a non-negative integer", self.seed)

    @property
    def needs_text(self) -> bool:
        """Whether pruning with this configuration reads calibration text."""
        return self.compensate != "none" or importance.get(self.method).needs_activations

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
