"""The loss of a dense model while all its layers are narrowed for a trial."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ...base.errors import check
from ...model.described import Described
from ...model.narrowing import Rest, narrowed, narrowed_bank
from ...model.units import Expert, groups


def windows_by_source(ids: Tensor, sources: Tensor | None, count: int) -> list[Tensor]:
    """Of each source up to `count` windows, spread evenly over those it has: `[n, W]` a source.

    Args:
        ids: `[N, W]` token ids.
        sources: `[N]`, the source of each window; None for one source.
        count: at least 1.
    """
    sources = torch.zeros(len(ids), dtype=torch.int64) if sources is None else sources
    found = []
    for source in sources.unique().tolist():
        own = ids[sources == source]
        found.append(own[torch.linspace(0, len(own) - 1, min(count, len(own))).round().long()])
    return found


def turns(windows: Sequence[Tensor], count: int, groups: int) -> list[list[Tensor]]:
    """`groups` groups with `count` windows of each source; a source that has fewer gives the same again.

    Args:
        windows: `[n, W]` a source.
        count: at least 1.
        groups: at least 1.
    """
    return [[own[[(turn * count + i) % len(own) for i in range(count)]] for own in windows] for turn in range(groups)]


class MaskedLoss:
    """Mean cross entropy of a token in nats, every source counting alike, as a function of the layers' widths.

    Each layer keeps its neurons of highest scores, with their weights as they are: no repair.

    Args:
        described: a causal LM of Transformers, in eval mode; its weights stay as they are.
        scores: `[F]` a layer, higher = keep.
        windows: `[n, W]` token ids for each source.
    """

    def __init__(self, described: Described, scores: Sequence[Tensor], windows: Sequence[Tensor]) -> None:
        self._groups = groups(described.ffns)
        self._orders = [s.argsort(descending=True, stable=True) for s in scores]
        self._models = [Rest(described.model, ids) for ids in windows]

    def __call__(self, widths: Sequence[int]) -> float:
        """The loss at `widths`, one for each FFN.

        Raises:
            InputError: a loss that is not finite.
        """
        keeps = [order[:width].sort().values for order, width in zip(self._orders, widths, strict=True)]
        with ExitStack() as stack:
            for group in self._groups:
                moved = [ffn for ffn in group if len(keeps[ffn.layer]) < len(self._orders[ffn.layer])]
                if moved and isinstance(group[0], Expert):
                    own = [keeps[ffn.layer] for ffn in group]
                    stack.enter_context(narrowed_bank(group[0].of_bank, own))
                    continue
                for ffn in moved:
                    stack.enter_context(narrowed(ffn, keeps[ffn.layer]))
            losses = torch.tensor([model.loss(0, None) for model in self._models], dtype=torch.float64)
        check(bool(losses.isfinite().all()), "loss of a narrowed model", "be finite", losses.tolist())
        return float(losses.mean())
