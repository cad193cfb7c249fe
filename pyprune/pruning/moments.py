"""Sums from which `ActivationStats` come, one window after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..base.errors import check
from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats
from ..model.units import FFN

# Rows of an expert that are added at once: what is added to, `[F, F]`, is far larger than a few rows.
MANY = 1024
# Second moments are symmetric: of each block of so many columns what lies below is not multiplied, but copied. A GPU
# needs more columns to be busy.
BLOCK, GPU_BLOCK = 256, 1024


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a^T b` of `[T, F]` and `[T, D]`, summed in float32, in which products of 16-bit floats are exact."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # which is the user's, or the layer's that is watched
        return a.float().t() @ b.float()


class Moments:
    """Running sums over tokens of what enters a down projection."""

    def __init__(self, size: int, hidden: int, device: torch.device, gram: bool, cross: bool) -> None:
        self.tokens, self.routed = 0, 0.0
        self.shape, self.device, self.gram, self.with_cross = (size, hidden), device, gram, cross and gram
        self.total, self.absolute, self.square = torch.zeros(3, size, dtype=torch.float64, device=device)
        self._block = BLOCK if device.type == "cpu" else GPU_BLOCK
        self.second = self.empty_second()

    def empty_second(self) -> tuple[Tensor | None, Tensor | None]:
        """Zeros for the second moment `[F, F]` and the cross moment `[F, D]`, where they are asked for."""
        size, hidden = self.shape
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device) if self.gram else None
        cross = torch.zeros(size, hidden, dtype=torch.float64, device=self.device) if self.with_cross else None
        return gram, cross

    def add(self, a: Tensor, more: Tensor | None, weights: Tensor | None = None) -> None:
        """Add the tokens of `a` (`[T, F]`), and of `more` (`[T, D]`) what the twin has more.

        Args:
            weights: `[T]` of the router, where there is one.
        """
        given, a = a, a.float()
        self.tokens += len(a)
        self.absolute.add_(a.abs().sum(0, dtype=torch.float64))
        self.routed += len(a) if weights is None else float(weights.double().sum())
        if weights is not None:
            given = a = a * weights.float()[:, None]
        self.total.add_(a.sum(0, dtype=torch.float64))
        self.square.add_(a.double().square().sum(0))
        gram, cross = self.second
        if gram is not None:
            for i in range(0, len(gram), self._block):
                gram[i : i + self._block, i:].add_(_product(given[:, i : i + self._block], given[:, i:]))
        if cross is not None and more is not None:
            cross.add_(_product(given, more))

    def share(self, ranks: Ranks) -> None:
        """Let all but the second moments be sums over the tokens of all ranks; nothing is added after that."""
        counts = torch.tensor([self.tokens, self.routed], dtype=torch.float64)
        ranks.add(counts, self.total, self.absolute, self.square)
        self.tokens, self.routed = int(counts[0]), float(counts[1])

    def to_stats(self) -> ActivationStats:
        """The sums so far, as means where `ActivationStats` has means."""
        gram, cross = self.second
        if gram is not None:
            for i in range(0, len(gram), self._block):
                gram[i + self._block :, i : i + self._block] = gram[i : i + self._block, i + self._block :].t()
        t = max(1, self.tokens)
        means = self.total / t, self.absolute / t
        return ActivationStats(self.tokens, *means, self.square.clone(), gram, cross=cross, routed=self.routed / t)


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


class Gathered:
    """Moments of one FFN, group of windows by group: the first is what a fit sees, the others are held out from it.

    Args:
        ffn: the FFN.
        device: of the sums.
        gram, cross: also the second moment, and with what a twin has more.
        held_out: there are groups that are held out.
        ranks: among which the windows of each group are shared out.
    """

    def __init__(
        self, ffn: FFN, device: torch.device, gram: bool, cross: bool, held_out: bool, ranks: Ranks = ALONE
    ) -> None:
        self.ffn, self._ranks = ffn, ranks
        self.moments = Moments(ffn.intermediate_size, ffn.hidden_size, device, gram, cross)
        self._down = ffn.weights().down.double() if held_out else None
        self._before = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._fit: ActivationStats | None = None
        self._total: ActivationStats | None = None
        self._held: ActivationStats | None = None

    def add(self, a: Tensor, weights: Tensor | None) -> None:
        """Add rows `[T, F]` of one call; those of experts, which are few each time, wait until they are many."""
        if weights is None:
            self.moments.add(a, None)
            return
        self._waiting.append((a.float(), weights))
        if sum(len(rows) for rows, _ in self._waiting) >= MANY:
            self._take()

    def _take(self) -> None:
        if self._waiting:
            rows, weights = zip(*self._waiting, strict=True)
            self.moments.add(torch.cat(rows), None, torch.cat(weights))
            self._waiting.clear()

    def open(self) -> None:
        """A group of windows begins."""
        self.moments.second, self._before = self.moments.empty_second(), self.moments.tokens

    def close(self) -> None:
        """And ends."""
        self._take()
        tokens = torch.tensor([self.moments.tokens - self._before])
        self._ranks.add(tokens, *(second for second in self.moments.second if second is not None))
        if self._down is None:
            return
        part = replace(self.moments.to_stats(), tokens=int(tokens))
        if self._fit is None:
            self._fit = part
        else:
            self._held = added(self._held, part, output_energy(part, self._down))
        self._total = added(self._total, part)

    def stats(self) -> ActivationStats:
        """Of all groups.

        Raises:
            InputError: activations that are not finite.
        """
        self.moments.share(self._ranks)
        whole = self.moments.to_stats()
        bad = (~whole.square_sum.isfinite()).nonzero()
        message = f"be finite; {len(bad)} of {self.ffn.intermediate_size} neurons are not, the first is"
        check(len(bad) == 0, f"activations of layer {self.ffn.layer}", message, bad[:1].flatten().tolist())
        if self._total is None:
            return whole
        total = self._total
        return replace(whole, gram=total.gram, cross=total.cross, seen=self._fit, held_out=self._held)


def split(sources: list[int], held_out: bool) -> list[list[int]]:
    """Windows, by number: first those of the fit; then, with `held_out`, each source's last quarter.

    Args:
        sources: which source each window is from.
    """
    count = len(sources)
    if not held_out:
        return [list(range(count))]
    by_source = [[w for w in range(count) if sources[w] == source] for source in sorted(set(sources))]
    # A source of one window is fitted and not judged, unless it is the only one.
    judged = [windows for windows in by_source if len(windows) > 1 or len(by_source) == 1]
    held = [windows[len(windows) - max(1, len(windows) // 4) :] for windows in judged or by_source]
    apart = {w for windows in held for w in windows}
    return [[w for w in range(count) if w not in apart], *held]


def shares(sources: list[int], ranks: int) -> list[list[int]]:
    """Windows, by number, that each of `ranks` processes carries: of every group of `split` as many, but for one."""
    order = [w for group in split(sources, ranks > 1) for w in group]
    return [sorted(order[rank::ranks]) for rank in range(ranks)]


def in_order(ranks: Ranks, numbers: list[int], rows: list[Tensor]) -> list[Tensor]:
    """What all ranks have, in the order of its numbers, which are those of `rows` here."""
    if not ranks.several:
        return rows
    found = ranks.exchange({str(n): row for n, row in zip(numbers, rows, strict=True)}, rows[0].device)
    return [found[str(n)] for n in range(len(found))]
