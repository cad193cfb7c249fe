"""One walk through the dense model that finds the curve of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import UnsupportedModelError, check, check_choice
from ...base.progress import Progress, quiet
from ...base.ranks import ALONE, Ranks
from ...base.statistics import ActivationStats
from ...base.windows import check_windows
from ...model import families
from ...model.described import Described
from ...model.families import FFN
from ...model.narrowing import Rest, narrowed
from ...model.units import Expert, groups
from ..allocation import bounds
from ..calibration import LayerStream
from ..repair.least_squares import least_squares
from .curve import KINDS, SensitivityCurves
from .estimate import output_gradients, second_order

# A measured point costs a pass through the rest of the model; the estimates give every width at once.
SHARES = {"loss": (0.8, 0.6, 0.4, 0.2), "error": (), "fisher": ()}
WINDOWS = {"loss": 2, "error": 4, "fisher": 4}
_FINE = tuple(i / 32 for i in range(31, 0, -1))

# Importance `[F]` of one FFN's neurons from the dense model's statistics, higher = keep.
Scorer = Callable[[FFN, ActivationStats], Tensor]


def _look(stream: LayerStream, ffn: FFN, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What enters decoder layer and down projection over the stream's windows: `[n, W, D]` and `[n * W, F]`."""
    hidden: list[Tensor] = []
    inner: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def inside(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inner.append(args[0].reshape(-1, args[0].shape[-1]).float())

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        ffn.down.register_forward_pre_hook(inside),
    ]
    try:
        stream.statistics(ffn, gram=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(hidden), torch.cat(inner)


def _look_routed(stream: LayerStream, group: list[FFN], width: int) -> list[tuple[Tensor, Tensor]]:
    """Of each expert of a bank: `[n]` tokens that went to it, in windows of `width`, and `[n, F]` what it adds up."""
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in group]
    window = -1

    def see(ffn: FFN, a: Tensor, weights: Tensor | None, tokens: Tensor | None) -> None:
        nonlocal window
        window += ffn is group[0]
        assert isinstance(ffn, Expert) and weights is not None and tokens is not None
        found[ffn.number].append((window * width + tokens, a.float() * weights[:, None].float()))

    stream.see_all(group, see)
    return [(torch.cat([t for t, _ in calls]), torch.cat([a for _, a in calls])) for calls in found]


def curves(
    described: Described,
    ids: Tensor,
    score: Scorer,
    *,
    kind: str = "loss",
    shares: Sequence[float] | None = None,
    multiple: int = 1,
    damping: float | None = None,
    gram: bool = False,
    windows: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
    ranks: Ranks = ALONE,
) -> SensitivityCurves:
    """Narrow each layer of the dense model alone, and find what that does to the loss. The model stays as it is.

    The experts of a bank are one layer, all of one width: what they do is taken to add up. Estimates alone know them.

    Cost of `loss`: layers x shares passes of `windows` windows through the rest of the model; of the estimates: one
    backward pass over them, and a Cholesky factor of each layer.

    Args:
        described: a causal LM of Transformers, in eval mode.
        ids: `[N, W]` calibration tokens for statistics and repairs.
        score: importance from the dense model's statistics.
        kind: one of `KINDS`.
        shares: of each layer's neurons to try, in (0, 1); None for `SHARES`, or a fine grid for an estimate.
        multiple: widths are rounded to it.
        damping: ridge of the least-squares fit of each narrowed layer's down rows, as a share of the mean diagonal of
            the activations' second moment; None for the bare cut.
        gram: `score` needs `stats.gram`.
        windows: of `ids`, spread evenly, for which loss or gradients are computed; None for `WINDOWS`.
        seed: of the labels that the estimates draw.
        progress: called as `(stage, done, total)`.
        ranks: processes that share out the windows of the statistics; the few of the loss run on each.

    Raises:
        InputError: a value breaks its rule, or losses, activations or gradients are not finite.
        UnsupportedModelError: the layers do not simply hand one hidden state to the next, or experts with kind `loss`.
    """
    check_choice(kind, "kind", KINDS)
    tried = tuple(shares) if shares is not None else SHARES[kind] or _FINE
    check(len(tried) > 0 and all(0 < s < 1 for s in tried), "shares", "be one or more shares in (0, 1)", list(tried))
    check(damping is None or 0 < damping < math.inf, "damping", "be positive and finite", damping)
    windows = WINDOWS[kind] if windows is None else windows
    check(windows >= 1, "windows", "be at least 1", windows)
    check(ids.ndim == 2 and ids.shape[1] >= 2, "ids", "be [N, W] with at least 2 tokens a window", tuple(ids.shape))
    model, ffns = described.model, described.ffns
    check_windows(model, ids, "ids")
    every = groups(ffns)
    if kind == "loss" and any(isinstance(ffn, Expert) for ffn in ffns):
        raise UnsupportedModelError("curves of kind 'loss' are not measured of experts: use 'error' or 'fisher'")
    finder = _Finder(model, ffns, ids, score, kind, damping, gram, windows, seed, progress, ranks)
    rows = []
    for number, group in enumerate(every):
        size = group[0].intermediate_size
        check(size > 1, f"layer {group[0].layer}", "have more than one neuron", size)
        widths = {bounds.round_width(share * size, multiple, size) for share in tried}
        widths = {width for width in widths if width < size} or {max(1, size // 2)}
        rows.append(finder.layer(number, group, sorted(widths)))
    progress("sensitivity of layers", len(every), len(every))
    return SensitivityCurves(
        kind=kind,
        sizes=tuple(group[0].intermediate_size for group in every),
        members=tuple(map(len, every)) if len(every) < len(ffns) else (),
        widths=tuple(tuple(row) for row in rows),
        losses=tuple(tuple(row.values()) for row in rows),
        tokens=finder.predicted,
        fingerprint=described.fingerprint,
    )


class _Finder:
    """One run of `curves`: two streams move through the dense model together, one of all windows for statistics, one of
    those whose loss counts.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: list[FFN],
        ids: Tensor,
        score: Scorer,
        kind: str,
        damping: float | None,
        gram: bool,
        windows: int,
        seed: int,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self._score, self._kind, self._damping, self._gram = score, kind, damping, gram
        self._progress, self._layers = progress, list(families.decoder_layers(model)[1])
        chosen = torch.linspace(0, len(ids) - 1, min(windows, len(ids))).round().long()
        few = ids[chosen]
        self.predicted, self._width = few.numel() - len(few), few.shape[1]
        if kind == "loss":
            self._rest = Rest(model, few)
            self._dense = self._rest.dense_loss()
        else:
            self._gradients = output_gradients(model, ffns, few, seed, progress)
        self._stream = LayerStream(model, ffns, ids, ranks=ranks)
        self._few = LayerStream(model, ffns, few)

    @torch.no_grad()
    def layer(self, number: int, group: list[FFN], widths: list[int]) -> dict[int, float]:
        """Width -> growth of the loss, for an FFN or a bank of experts, to which both streams move."""
        ffn, gram = group[0], self._gram or self._damping is not None
        self._progress("sensitivity of layers", ffn.block, len(self._layers))
        for stream in (self._stream, self._few):
            stream.reach(ffn)
        if isinstance(ffn, Expert):
            return self._of_experts(number, group, gram, widths)
        stats = self._stream.statistics(ffn, gram=gram)
        hidden, activations = _look(self._few, ffn, self._layers[ffn.block])
        order = self._score(ffn, stats).argsort(descending=True, stable=True)
        if self._kind == "loss":
            return {width: self._measured(ffn, stats, order[:width].sort().values, hidden) for width in widths}
        return self._estimated(ffn, stats, order, activations, self._gradients[number], widths)

    def _of_experts(self, number: int, group: list[FFN], gram: bool, widths: list[int]) -> dict[int, float]:
        total = dict.fromkeys(widths, 0.0)
        every = self._stream.group_statistics(group, gram)
        looked = _look_routed(self._few, group, self._width)
        for ffn, stats, (tokens, activations) in zip(group, every, looked, strict=True):
            if stats.tokens == 0 or len(tokens) == 0:
                continue
            order = self._score(ffn, stats).argsort(descending=True, stable=True)
            gradients = self._gradients[number][tokens]
            for width, loss in self._estimated(ffn, stats, order, activations, gradients, widths).items():
                total[width] += loss
        return total

    def _measured(self, ffn: FFN, stats: ActivationStats, keep: Tensor, hidden: Tensor) -> float:
        down = None
        if self._damping is not None:
            weights = ffn.weights().down
            down = least_squares(weights, stats, keep.to(weights.device), self._damping).down
        with narrowed(ffn, keep, down):
            return self._rest.loss(ffn.layer, hidden) - self._dense

    def _estimated(
        self,
        ffn: FFN,
        stats: ActivationStats,
        order: Tensor,
        activations: Tensor,
        gradients: Tensor,
        widths: list[int],
    ) -> dict[int, float]:
        gram = None if self._damping is None or stats.gram is None else stats.gram / stats.tokens
        down = ffn.weights().down
        total = second_order(self._kind, activations, gradients, down, order, gram, self._damping or 0.0)
        return {width: float(total[width]) / self.predicted for width in widths}
