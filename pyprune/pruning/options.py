"""What the user chooses for pruning neurons, together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..base.errors import check, check_choice, is_count, is_number
from ..base.machine import PRECISIONS
from ..model.described import Described
from . import importance
from .allocation import ALLOCATIONS, Allocation
from .repair import Repair
from .repair import parse as parse_repair

# What is done where nobody says otherwise: what measured best of all that every engine loads, and of the tenths the
# smallest share kept at which perplexity grows by at most a third in the mean of six domains (bench/notes/quality.md).
KEEP, METHOD, ALLOCATION, REPAIR = 0.8, "obs", "uniform", "least-squares:target=auto"


@dataclass(frozen=True)
class PruneOptions:
    """How to prune; see `prune.prune` for the fields.

    Raises:
        InputError: a value breaks its rule.
    """

    keep: float
    method: str
    allocation: Allocation
    repair: Repair
    sequential: bool = True
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        check(is_number(self.keep) and 0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        importance.get(self.method)
        check(isinstance(self.sequential, bool), "sequential", "be True or False", self.sequential)
        check(is_count(self.seed), "seed", "be a non-negative integer", self.seed)
        check_choice(self.precision, "precision", PRECISIONS)
        self.allocation.check(self.keep)
        self.repair.check(self.sequential)

    @classmethod
    def of(
        cls,
        keep: float = KEEP,
        method: str = METHOD,
        allocation: Allocation | str = ALLOCATION,
        repair: Repair | str | None = REPAIR,
        sequential: bool = True,
        seed: int = 0,
        precision: str = "float32",
    ) -> PruneOptions:
        """From options or their short forms."""
        return cls(keep, method, ALLOCATIONS.parse(allocation), parse_repair(repair), sequential, seed, precision)

    def suited(self, model: nn.Module | Described, streamed: bool = True) -> PruneOptions:
        """The same with what the repair chooses for a model; `streamed`: text goes through it layer by layer."""
        return replace(self, repair=self.repair.suited(model, self.sequential and streamed))

    def needs_text(self, mask: bool = False) -> bool:
        """Whether calibration text is read; with `mask`, where the neurons that stay are given."""
        scoring = self.allocation.NEEDS_TEXT or bool(importance.get(self.method).needs)
        return bool(self.repair.needs) or (scoring and not mask)

    @property
    def purpose(self) -> str:
        """What text would be for."""
        return f"method {self.method!r}, allocation {self.allocation.NAME!r} and repair {self.repair.NAME!r}"

    def facts(self, mask: bool = False) -> dict[str, Any]:
        """What had a say, flat, as checkpoints and reports keep it; with `mask`, which brings its own provenance."""
        repaired: dict[str, Any] = {"compensate": self.repair.NAME, **self.repair.values()}
        if repaired.get("damping") == "auto":
            repaired["damping"] = None  # as in the files that are there
        if self.needs_text(mask):
            repaired["sequential"] = self.sequential
        if mask:
            return repaired
        spread = {k: list(v) if isinstance(v, tuple) else v for k, v in self.allocation.values().items()}
        if spread.get("protect") == [0, 0]:
            del spread["protect"]
        keep = {"keep": self.keep} if self.allocation.USES_KEEP else {}
        how = {"method": self.method, "structure": "neurons", "allocation": self.allocation.NAME, "seed": self.seed}
        return {**keep, **how, **spread, **repaired}
