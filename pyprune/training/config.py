"""What the user chooses for pruning during training: frozen, and validated when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..base.errors import check, check_choice, is_number
from . import methods
from .methods import Method, Movement
from .schedule import CubicSchedule, check_whole

SCOPES = ("layer", "global")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to prune while training.

    Attributes:
        method: the method with its options (`pyprune.training.methods`), or its short form, as `gum:similarity=0.5`.
        keep: share of neurons that stays at the end, in (0, 1]. For `movement-soft` it shapes the schedule only.
        steps: optimizer steps of the whole training.
        warmup, cooldown: of those, the steps before anything is removed, and those at the final share, in which scores
            still learn and neurons may change places.
        initial: share of neurons kept at the start.
        scope: `layer` keeps the same share in every layer, `global` the highest scores of the whole model; None for
            what the method was published with.
        floor: least share of neurons that any layer keeps, in [0, keep]; one neuron in any case.
        multiple: widths are multiples of this, to the nearest, from the moment that the final share is reached.
        seed: of everything random.

    Raises:
        InputError: a value breaks its rule.
    """

    method: Method | str = field(default_factory=Movement)
    keep: float = 0.5
    steps: int
    warmup: int = 0
    cooldown: int = 0
    initial: float = 1.0
    scope: str = None  # type: ignore[assignment]  # a string from __post_init__ on
    floor: float = 0.0
    multiple: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", method := methods.parse(self.method))
        if self.scope is None:
            object.__setattr__(self, "scope", method.SCOPE)
        _ = self.schedule
        check_choice(self.scope, "scope", SCOPES)
        fits = is_number(self.floor) and 0 <= self.floor <= self.keep
        check(fits, "floor", f"lie in [0, keep] = [0, {self.keep}]", self.floor)
        check_whole(self.multiple, "multiple", 1)
        check_whole(self.seed, "seed", 0)

    @property
    def schedule(self) -> CubicSchedule:
        """v(t)."""
        return CubicSchedule(self.keep, self.steps, self.warmup, self.cooldown, self.initial)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what was left open is filled in, the method is its short form in full."""
        return {**asdict(self), "method": methods.parse(self.method).in_full}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingConfig:
        """The configuration that `to_json` gave.

        Raises:
            InputError: an unknown key, no `steps`, or a value that breaks its rule.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            check_choice(key, "key of the training configuration", known)
        check("steps" in values, "training configuration", "have steps", sorted(values))
        return cls(**values)
