"""What an allocation is, what it may ask of the dense model, and the table of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ...base.errors import check, is_count, is_number
from ...base.options import Option, Registry
from ...base.progress import Progress
from ...base.ranks import Ranks
from ...model.described import Described
from ...model.mask import KeepIndex
from ...speed.latency import LatencyTable
from ..sensitivity.curve import SensitivityCurves


class Layers(Protocol):
    """The layers of a dense model. What is asked for is measured then, once.

    Attributes:
        sizes: F of each layer.
        described: the model.
        ids: `[N, W]` calibration tokens, or None where none are needed.
        sources: `[N]`, the source of each window; None where there is one.
        progress: called as `(stage, done, total)`.
        ranks: processes that plan together, each with the same layers.
    """

    sizes: list[int]
    described: Described
    ids: Tensor | None
    sources: Tensor | None
    progress: Progress
    ranks: Ranks

    def scores(self) -> list[Tensor]:
        """`[F]` a layer, higher = keep."""

    def curves(self, multiple: int) -> SensitivityCurves:
        """How much the loss grows when one layer alone is narrowed, to multiples of `multiple`."""

    def latencies(self, widths: Sequence[int], workload: str) -> LatencyTable:
        """What FFNs of `widths` cost on this machine, in this model."""


@dataclass(frozen=True)
class Plan:
    """What each layer keeps.

    Attributes:
        layers: the neurons, or how many where that is all that can be said before a layer is reached.
        promise: the speed-up that these widths should have, where that was asked for.
    """

    layers: list[KeepIndex] | list[int]
    promise: float | None = None


@dataclass(frozen=True, kw_only=True)
class Allocation(Option):
    """How many neurons each layer keeps; a subclass in a file of its own, under `@ALLOCATIONS.add`.

    Attributes:
        multiple: widths are rounded to multiples of this, to the nearest; never below one multiple or above F.
        protect: how many (first, last) layers keep all their neurons; the others share what is left.
        NEEDS_TEXT: whether `plan` asks for what is measured on calibration text, apart from scores.
        USES_KEEP: whether `keep` says how many neurons stay.
    """

    NEEDS_TEXT: ClassVar[bool] = False
    USES_KEEP: ClassVar[bool] = True

    multiple: int = 64
    protect: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check(is_count(self.multiple) and self.multiple >= 1, "multiple", "be a positive integer", self.multiple)
        pair = isinstance(self.protect, tuple | list) and len(self.protect) == 2 and all(map(is_count, self.protect))
        check(pair, "protect", "be two counts of layers, first and last", self.protect)
        object.__setattr__(self, "protect", tuple(self.protect))

    def check(self, keep: float) -> None:
        """Raise `InputError` where the share `keep` and these options contradict each other."""

    def known(self, sizes: Sequence[int], keep: float) -> list[int] | None:
        """The widths, where they follow from `sizes` alone; else None."""
        return None

    def plan(self, layers: Layers, keep: float) -> Plan:
        """The share `keep` of all neurons, spread over the layers.

        Raises:
            InputError: no widths that these options allow are near `keep`.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Floored(Allocation):
    """One that gives layers different shares.

    Attributes:
        floor: the least share of neurons that any layer keeps, in [0, 1].
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_number(self.floor) and 0 <= self.floor <= 1, "floor", "lie in [0, 1]", self.floor)

    def check(self, keep: float) -> None:
        check(self.floor <= keep or not self.USES_KEEP, "floor", f"be at most keep ({keep})", self.floor)


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
