"""One run of `Pruner` over a model whose layers accelerate's hooks keep elsewhere: each comes, is cut, goes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..base.errors import UnsupportedModelError, check
from ..model.families import FFN
from ..model.mask import KeepIndex
from ..model.offloaded import OffloadedLayers
from . import importance
from .calibration import LayerStream
from .options import PruneOptions
from .pruner import Pruner


class OffloadedPruner(Pruner):
    """`Pruner` of a model with offloaded layers.

    Args:
        layers: of the model.
        more: as `Pruner`, without the model.
    """

    def __init__(self, layers: OffloadedLayers, *more: Any) -> None:
        super().__init__(layers.described, *more)
        self.layers = layers

    def stream(self, twin: bool = False) -> LayerStream:
        with self.layers.front():
            found = super().stream(twin)
        if not isinstance(found, LayerStream):
            kind = type(self.described.model).__name__
            raise UnsupportedModelError(f"{kind} cannot be calibrated layer by layer, so it must be loaded whole")
        return found

    def scores(self) -> list[Tensor]:
        if self._scores:
            return self._scores
        stream, last = self.stream() if self.criterion.needs else None, len(self.ffns)
        for ffn in self.ffns:
            self.progress("scoring neurons", ffn.layer, last)
            self.layers.need(ffn.block)
            stats = None if stream is None else stream.statistics(ffn, "gram" in self.criterion.needs)
            self._scores.append(self.score(ffn, stats))
            if stream is not None and ffn.layer + 1 < last:
                stream.advance()
            self.layers.drop(ffn.block)
        self.progress("scoring neurons", last, last)
        return self._scores

    def enter(self, stage: list[list[FFN]]) -> None:
        self.layers.need(stage[0][0].block)

    def leave(self, stage: list[list[FFN]], chosen: list[KeepIndex], stream: Any) -> None:
        block = stage[0][0].block
        if stream is not None and self.options.sequential and block + 1 < len(self.ffns):
            stream.advance()
        self.layers.drop(block, changed=True)


@contextmanager
def present(layers: OffloadedLayers | None) -> Iterator[None]:
    """Inside, text can go through the first layer; of a model that is there whole, nothing changes."""
    if layers is None:
        yield
        return
    with layers.front():
        yield


def check_offloaded(options: PruneOptions) -> None:
    """Raise `InputError` for what cannot be done layer by layer."""
    where = "where accelerate's hooks keep layers elsewhere"
    rule = f"be uniform or global {where}: others run the whole model many times; load it whole, or give a mask"
    check(options.allocation.NAME in ("uniform", "global"), "allocation", rule, options.allocation.NAME)
    gradients = importance.get(options.method).needs & {"gradients", "gradients2"}
    rule = f"need no gradients {where}: they go back through the whole model; take obs, wanda or a magnitude"
    check(not gradients, "method", rule, options.method)
