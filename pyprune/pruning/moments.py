"""Sums from which `ActivationStats` come, one window after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..base.statistics import ActivationStats


class Moments:
    """Running sums over tokens of what enters a down projection."""

    def __init__(self, size: int, hidden: int, device: torch.device, gram: bool, cross: bool) -> None:
        self.tokens = 0
        self.shape, self.device, self.gram, self.with_cross = (size, hidden), device, gram, cross and gram
        self.total, self.absolute, self.square = torch.zeros(3, size, dtype=torch.float64, device=device)
        self.second = self.empty_second()

    def empty_second(self) -> tuple[Tensor | None, Tensor | None]:
        """Zeros for the second moment `[F, F]` and the cross moment `[F, D]`, where they are asked for."""
        size, hidden = self.shape
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device) if self.gram else None
        cross = torch.zeros(size, hidden, dtype=torch.float64, device=self.device) if self.with_cross else None
        return gram, cross

    def add(self, a: Tensor, more: Tensor | None) -> None:
        """Add the tokens of `a` (`[T, F]`), and of `more` (`[T, D]`) what the twin has more."""
        self.tokens += len(a)
        self.total.add_(a.sum(0, dtype=torch.float64))
        self.absolute.add_(a.abs().sum(0, dtype=torch.float64))
        self.square.add_(a.double().square().sum(0))
        gram, cross = self.second
        if gram is not None:
            gram.add_(a.t() @ a)
        if cross is not None and more is not None:
            cross.add_(a.t() @ more.float())

    def to_stats(self) -> ActivationStats:
        """The sums so far, as means where `ActivationStats` has means."""
        gram, cross = self.second
        t = max(1, self.tokens)
        return ActivationStats(self.tokens, self.total / t, self.absolute / t, self.square.clone(), gram, cross=cross)


def output_energy(stats: ActivationStats, down: Tensor) -> float:
    """Sum over tokens of the squared output of an FFN with down rows `down` (`[F, D]` float64), without its bias."""
    assert stats.gram is not None
    return float((down * (stats.gram @ down)).sum().clamp_min(torch.finfo(torch.float64).tiny))


def added(to: ActivationStats | None, part: ActivationStats, scale: float = 1.0) -> ActivationStats:
    """The second moments of `part` over `scale` added to those of `to`, in place; of None, to zero.

    Where a scale is a part's own output energy, every part counts alike in a relative error, however long it is.
    """
    assert part.gram is not None
    if to is None:
        cross = None if part.cross is None else part.cross / scale
        return replace(part, gram=part.gram / scale, cross=cross)
    assert to.gram is not None
    to.gram.add_(part.gram, alpha=1 / scale)
    if to.cross is not None and part.cross is not None:
        to.cross.add_(part.cross, alpha=1 / scale)
    return replace(to, tokens=to.tokens + part.tokens)
