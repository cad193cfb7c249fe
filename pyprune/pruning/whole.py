"""Calibration by whole forwards of the model, with hooks: for any model, and for batches as people have them.

Where `calibration.LayerStream` moves text through a model layer by layer, here the model runs from its start for every
group of FFNs: slower, by half the number of layers, but without assumptions about how layers hand on what they compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import InputError, PypruneError, UnsupportedModelError, one_line
from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats
from ..model.units import FFN, Expert
from .batches import Batch
from .moments import Gathered, in_order, shares, split
from .observing import See, observing


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass whose rest nobody needs
    pass


class WholeForwards:
    """Batches that run through a model as often as is asked for.

    Args:
        model: a model of Transformers, in eval mode.
        batches: what it is called with.
        ranks: processes that each run a part of the batches.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], ranks: Ranks = ALONE) -> None:
        self._model: Any = model
        self._batches, self._ranks = batches, ranks
        self._mine = shares([0] * len(batches), ranks.size)[ranks.rank]
        self._device = next(model.parameters()).device

    def reach(self, ffn: FFN) -> None:
        """Nothing: every forward begins at the start."""

    def advance(self) -> None:
        """Nothing, as above."""

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """One forward of the model."""
        words = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.words.items()}
        try:
            self._model(**words, use_cache=False)
        except (_Stop, PypruneError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model makes of keywords and shapes
            kind = type(self._model).__name__
            raise InputError(f"text must be batches that {kind} takes; it says: {one_line(error)}") from error

    def group_statistics(self, group: list[FFN], gram: bool, held_out: bool = False) -> list[ActivationStats]:
        """As `calibration.LayerStream.group_statistics`; positions that are padded do not count.

        Raises:
            InputError: activations that are not finite, or a router that names an expert there is not.
            UnsupportedModelError: batches have padding, and an FFN sees other positions than theirs.
        """
        found = [Gathered(ffn, self._device, gram, False, held_out, self._ranks) for ffn in group]
        by_name = {ffn.name: one for ffn, one in zip(group, found, strict=True)}
        stops = not group[0].shared and (len(group) == 1 or isinstance(group[0], Expert))

        def see(ffn: FFN, a: Tensor, weights: Tensor | None, tokens: Tensor | None) -> None:
            by_name[ffn.name].add(a, weights)
            if stops and ffn is group[-1]:
                raise _Stop

        for numbers in split([0] * len(self._batches), held_out):
            for one in found:
                one.open()
            for number in (n for n in numbers if n in self._mine):
                batch = self._batches[number]
                with observing(group, self._unpadded(batch, see)):
                    try:
                        self.run(batch)
                    except _Stop:
                        continue
            for one in found:
                one.close()
        return [one.stats() for one in found]

    def see_all(self, group: list[FFN], see: See) -> None:
        """Show `see` what a group's FFNs get, of all positions that are no padding."""
        for batch in self._batches:
            with observing(group, self._unpadded(batch, see)):
                self.run(batch)

    def _unpadded(self, batch: Batch, see: See) -> See:
        """`see` without the positions of a batch that are padded."""

        def seen(ffn: FFN, a: Tensor, weights: Tensor | None, tokens: Tensor | None) -> None:
            there = batch.positions(ffn.stack)
            if there is None:
                see(ffn, a, weights, tokens)
                return
            if tokens is None and (ffn.expert or len(a) != there.numel()):
                raise UnsupportedModelError(
                    f"{ffn.name} gets {len(a)} rows where the batch has {there.numel()} positions, so those that are "
                    "padded cannot be told: give batches without padding"
                )
            there = there.to(a.device)
            valid = there if tokens is None else there[tokens]
            see(ffn, a[valid], None if weights is None else weights[valid], None if tokens is None else tokens[valid])

        return seen

    def inputs(self, ffn: FFN) -> tuple[Tensor, Tensor | None]:
        """`[T, D]`: what enters `ffn`, as `calibration.LayerStream.inputs`."""
        entrance = ffn.holder.get_submodule(ffn.pattern.inputs[0][0])
        entering: list[Tensor] = []
        for batch in (self._batches[n] for n in self._mine):
            there = batch.positions(ffn.stack)

            def before(_: nn.Module, args: tuple[Tensor, ...], there: Tensor | None = there) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).float()
                entering.append(rows if there is None else rows[there.to(rows.device)])

            handle = entrance.register_forward_pre_hook(before)
            try:
                self.run(batch)
            finally:
                handle.remove()
        return torch.cat(in_order(self._ranks, self._mine, entering)), None
