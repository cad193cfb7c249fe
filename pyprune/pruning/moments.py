"""Sums from which `ActivationStats` come, one window after the other."""

from __future__ import annotations

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
