"""What the user chooses for pruning: frozen, and validated when it is made."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..base.errors import check, check_choice, is_count, is_number
from . import importance

ALLOCATIONS = ("uniform", "global", "sensitivity", "latency")
COMPENSATIONS = ("none", "bias", "least-squares", "refit")
# What can be removed, and the compensations that go with it.
STRUCTURES = {"neurons": COMPENSATIONS, "ffn": ("none", "bias"), "layer": ("none",)}
# Compensations that fit the kept neurons to an output, and so need the second moment of the activations.
FITS = ("least-squares", "refit")
_WORKLOAD = re.compile(r"(decode|prefill):[1-9]\d{0,6}(:\w+)?")


@dataclass(frozen=True)
class PruneConfig:
    """How to prune.

    Attributes:
        keep: share of neurons (of FFNs, of layers: see `structure`) that stays, in (0, 1]. With allocation `latency`
            the target decides, and `keep` is not used.
        method: a criterion's name (`pyprune.importance.names()`); not used with another `structure` than `neurons`.
        structure: `neurons`; `ffn` removes whole FFN blocks and `layer` whole decoder layers, by block influence.
        iterative: with whole blocks, measure all influences again after each removal; False: once, as published.
        allocation: how many neurons each layer keeps. `uniform`: the same share. `global`: neurons of all layers
            compete by their standardised scores. `sensitivity`: the widths that cost least by curves of each layer.
            `latency`: those that cost least among all that meet `target_speedup` on this machine.
        protect: how many (first, last) layers keep all their neurons; the others share what is left.
        multiple: widths are rounded to multiples of this, to the nearest; never below one multiple or above F.
        floor: with every allocation but `uniform`, the least share of neurons that any layer keeps, in [0, 1].
        target_speedup: of the whole model over the dense one, both accelerated, with allocation `latency`; above 1.
        workload: what that speed-up is of: `decode:1` for steps of one token with one sequence, `prefill:512` for a
            prompt of 512 tokens; a third part, as in `decode:1:int8`, for weights that are kept in another dtype.
        compensate: `none`; `bias` adds the mean contribution of the removed neurons to the down bias;
            `least-squares` refits the down rows of the kept neurons to the dense output; `refit` then fits their gate,
            up and down rows to it by gradient.
        damping: ridge of the least-squares fit, as a share of the mean diagonal of the activations' second moment;
            None chooses it for each layer on a quarter of the windows that the fit has not seen.
        sequential: later layers are scored and repaired on what the already pruned earlier ones produce; False: on
            what the dense model produces.
        target: share of the dense model's residual stream in the target of the fit, in [0, 1]: at 0 a layer is fitted
            to its own dense output on the input it gets, at 1 it also makes up for what earlier layers lost.
        seed: of everything random.

    Raises:
        InputError: a value breaks its rule.
    """

    keep: float = 0.7
    method: str = "wanda"
    structure: str = "neurons"
    iterative: bool = False
    allocation: str = "uniform"
    protect: tuple[int, int] = (0, 0)
    multiple: int = 64
    floor: float = 0.0
    target_speedup: float | None = None
    workload: str = "decode:1"
    compensate: str = "least-squares"
    damping: float | None = 1e-2
    sequential: bool = True
    target: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(is_number(self.keep) and 0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        importance.get(self.method)
        check_choice(self.structure, "structure", STRUCTURES)
        check_choice(self.allocation, "allocation", ALLOCATIONS)
        allowed = STRUCTURES[self.structure]
        check_choice(self.compensate, "compensate", COMPENSATIONS)
        rule = f"be {' or '.join(map(repr, allowed))} with structure {self.structure!r}"
        check(self.compensate in allowed, "compensate", rule, self.compensate)
        check(isinstance(self.iterative, bool), "iterative", "be True or False", self.iterative)
        check(is_count(self.multiple) and self.multiple >= 1, "multiple", "be a positive integer", self.multiple)
        check(is_count(self.seed), "seed", "be a non-negative integer", self.seed)
        self._check_allocation()
        self._check_fit()

    def _check_allocation(self) -> None:
        pair = isinstance(self.protect, tuple | list) and len(self.protect) == 2 and all(map(is_count, self.protect))
        check(pair, "protect", "be two counts of layers, first and last", self.protect)
        object.__setattr__(self, "protect", tuple(self.protect))
        check(is_number(self.floor) and 0 <= self.floor <= 1, "floor", "lie in [0, 1]", self.floor)
        fits = self.allocation in ("uniform", "latency") or self.floor <= self.keep
        check(fits, "floor", f"be at most keep ({self.keep})", self.floor)
        target = self.target_speedup
        if self.allocation == "latency":
            above = is_number(target) and 1 < target < float("inf")  # type: ignore[operator]
            check(above, "target_speedup", "be a number above 1 with allocation 'latency'", target)
            check(
                bool(_WORKLOAD.fullmatch(self.workload)),
                "workload",
                "be like decode:1, prefill:512 or decode:1:int8",
                self.workload,
            )
        else:
            check(target is None, "target_speedup", "be given only with allocation 'latency'", target)

    def _check_fit(self) -> None:
        positive = self.damping is None or (is_number(self.damping) and 0 < self.damping < float("inf"))
        check(positive, "damping", "be positive and finite, or None", self.damping)
        check(isinstance(self.sequential, bool), "sequential", "be True or False", self.sequential)
        check(is_number(self.target) and 0 <= self.target <= 1, "target", "lie in [0, 1]", self.target)
        fitting = self.compensate in FITS
        check(fitting or self.target == 0, "target", f"be 0 with compensate {self.compensate!r}", self.target)
        check(self.sequential or self.target == 0, "target", "be 0 where nothing is sequential", self.target)
        check(self.sequential or self.compensate != "refit", "sequential", "be True with compensate 'refit'", False)

    @property
    def fits(self) -> bool:
        """Whether kept neurons are fitted to an output."""
        return self.compensate in FITS

    @property
    def needs_text(self) -> bool:
        """Whether pruning with this configuration reads calibration text."""
        measured = self.structure != "neurons" or self.allocation in ("sensitivity", "latency")
        return measured or self.compensate != "none" or bool(importance.get(self.method).needs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "protect": list(self.protect)}
