"""What the user chooses for pruning during training: frozen, and validated when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..base.errors import check, check_choice
from ..pruning import importance
from . import methods
from .ema import check_beta
from .methods.gum import FORMS
from .schedule import CubicSchedule, check_whole, is_number

SCOPES = ("layer", "global")
OPTIMIZERS = ("sgd", "adam")
_OPEN = {"scope": "layer", "optimizer": "sgd", "penalty": 0.0}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to prune while training.

    Attributes:
        method: a method's name (`pyprune.training.methods.names()`).
        keep: share of neurons that stays at the end, in (0, 1]. For `movement-soft` it shapes the schedule only.
        steps: optimizer steps of the whole training.
        warmup, cooldown: of those, the steps before anything is removed, and those after the last removal.
        initial: share of neurons kept at the start.
        scope: `layer` keeps the same share in every layer, `global` the highest scores of the whole model; None for
            what the method was published with.
        floor: least share of neurons that any layer keeps, in [0, keep]; one neuron in any case.
        multiple: widths are multiples of this, to the nearest, from the moment that the final share is reached.
        optimizer: of learned scores: `sgd`, or `adam` without weight decay; None for the method's own.
        score_rate: its learning rate, which does not change while training.
        penalty: weight of mean(sigmoid(s)) in the loss, once the schedule is through; None for the method's own.
        threshold: tau of `movement-soft`, in (0, 1).
        similarity: lambda of `gum`.
        similarity_beta: weight of the past in its running sums, in [0, 1).
        uniqueness_form: `penalty`, or `gradient`, which pushes the score gradient itself.
        inverted: `gum`'s ablation: push the neurons that are unlike the others.
        criterion: of `smoothed`, an importance criterion (`pyprune.pruning.importance.names()`); None for the method's own.
        beta, uncertainty_beta: of `platon`, `ema` and `smoothed`: weight of the past in the smoothed score, and in its
            uncertainty.
        seed: of everything random.

    Raises:
        InputError: a value breaks its rule.
    """

    method: str = "movement"
    keep: float = 0.5
    steps: int
    warmup: int = 0
    cooldown: int = 0
    initial: float = 1.0
    scope: str = None  # type: ignore[assignment]  # a string from __post_init__ on, as the next
    floor: float = 0.0
    multiple: int = 1
    optimizer: str = None  # type: ignore[assignment]
    score_rate: float = 1e-2
    penalty: float = None  # type: ignore[assignment]
    threshold: float = 0.1
    similarity: float = 1.0
    similarity_beta: float = 0.9
    uniqueness_form: str = "penalty"
    inverted: bool = False
    criterion: str | None = None
    beta: float = 0.85
    uncertainty_beta: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        defaults = {**_OPEN, **methods.get(self.method).defaults}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _ = self.schedule
        check_choice(self.scope, "scope", SCOPES)
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_choice(self.uniqueness_form, "uniqueness_form", FORMS)
        fits = is_number(self.floor) and 0 <= self.floor <= self.keep
        check(fits, "floor", f"lie in [0, keep] = [0, {self.keep}]", self.floor)
        check_whole(self.multiple, "multiple", 1)
        check_whole(self.seed, "seed", 0)
        positive = is_number(self.score_rate) and 0 < self.score_rate < float("inf")
        check(positive, "score_rate", "be positive and finite", self.score_rate)
        for name in ("penalty", "similarity"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < float("inf"), name, "be non-negative and finite", value)
        check(is_number(self.threshold) and 0 < self.threshold < 1, "threshold", "lie in (0, 1)", self.threshold)
        for name in ("similarity_beta", "beta", "uncertainty_beta"):
            check_beta(getattr(self, name), name)
        if self.criterion is not None:
            check("criterion" in defaults, "criterion", f"be left open with method {self.method!r}", self.criterion)
            check_choice(self.criterion, "criterion", importance.names())
        check(isinstance(self.inverted, bool), "inverted", "be true or false", self.inverted)

    @property
    def schedule(self) -> CubicSchedule:
        """v(t)."""
        return CubicSchedule(self.keep, self.steps, self.warmup, self.cooldown, self.initial)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what was left open is filled in."""
        return asdict(self)

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
