"""What a repair is, what it gets and gives, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...base.options import Option, Registry
from ...base.ranks import ALONE, Ranks
from ...base.statistics import ActivationStats
from ...model.described import Described
from ...model.families import FFN
from ...model.mask import KeepIndex


@dataclass(frozen=True)
class Layer:
    """One FFN about to be cut.

    Attributes:
        ffn: with all its neurons.
        keep: those that stay.
        stats: of the calibration tokens that reach it, with what the repair `needs`.
        inputs: gives `[T, D]` what enters the FFN, and `[T, D]` what the dense hidden state has more than this layer's
            output (None where no target asks for it).
        seed: of everything random.
        ranks: processes that fit this layer together: the same call on each, with the same statistics.
    """

    ffn: FFN
    keep: KeepIndex
    stats: ActivationStats
    inputs: Callable[[], tuple[Tensor, Tensor | None]]
    seed: int = 0
    ranks: Ranks = ALONE

    @property
    def kept(self) -> Tensor:
        """`[K]` int64, on the weights' device."""
        return self.keep.neurons.long().to(self.ffn.weights().down.device)


@dataclass
class Fitted:
    """New weights for the neurons that stay; None where the old ones do.

    Attributes:
        inputs: `[K, D]` gate and up rows (or up rows alone), in record order.
        input_biases: `[K]` of the same, None where there are none.
        down: `[K, D]` down rows.
        bias_shift: `[D]` to add to the down bias.
        error_cut, error_repaired, error_refit, damping: see `LayerReport`.
    """

    inputs: tuple[Tensor, ...] | None = None
    input_biases: tuple[Tensor | None, ...] | None = None
    down: Tensor | None = None
    bias_shift: Tensor | None = None
    error_cut: float | None = None
    error_repaired: float | None = None
    error_refit: float | None = None
    damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class Repair(Option):
    """What kept neurons take over from removed ones; a subclass in a file of its own, under `@REPAIRS.add`.

    Attributes:
        STRUCTURES: what it can stand in for when it is removed whole (see `prune_blocks`, `prune_experts`).
    """

    STRUCTURES: ClassVar[frozenset[str]] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """What of the statistics it looks at: `activations`, `gram`, `held_out`; empty: no calibration text."""
        return frozenset({"activations"})

    @property
    def share(self) -> float:
        """Share of the dense model's residual stream in what layers are fitted to, in [0, 1]."""
        return 0.0

    @property
    def ridge(self) -> float | None:
        """Damping with which curves of layers foresee this repair; None where it fits no down rows."""
        return None

    def suited(self, model: nn.Module | Described, sequential: bool) -> Repair:
        """The same with what is chosen for a model, described or not; `sequential` as in `prune`."""
        return self

    def check(self, sequential: bool) -> None:
        """Raise `InputError` where the order of scoring and fitting contradicts these options."""

    def check_model(self, described: Described) -> None:
        """Raise `UnsupportedModelError` where the model's format cannot hold the result."""

    def check_tokens(self, ids: Tensor, width: int) -> None:
        """Raise `InputError` where `ids` (`[N, W]`) are too few for a layer that keeps `width` neurons."""

    def prepare(self, described: Described) -> None:
        """Change what must be changed in the model before its first cut."""

    def fit(self, layer: Layer) -> Fitted:
        """New rows for the neurons that stay.

        Raises:
            InputError: activations or new rows that are not finite.
        """
        raise NotImplementedError


REPAIRS: Registry[Repair] = Registry("repair")


def parse(value: Repair | str | None, **more: object) -> Repair:
    """As `REPAIRS.parse`; None is `none`."""
    return REPAIRS.parse("none" if value is None else value, **more)
