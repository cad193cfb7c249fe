"""Redundancy of neurons: how many of them others stand for, how much the loss depends on each, and what pruning leaves.

Sensitivity and uniqueness as Santacroce et al. 2023, arXiv 2302.03773, section on redundancy: of a neuron, the mean
over samples of abs(sum over its parameters of w * dL/dw); of a layer, the share of neurons without another of cosine
similarity 0.8 or more, each pair counted once. Similarity is by activations on a text and within one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check, is_finite
from ...base.progress import Progress, quiet
from ...base.statistics import ActivationStats, GradientStats
from ...base.windows import check_windows, stack_batches
from ...model.families import FFN, find_ffns
from ...model.patterns import FFNWeights
from ...model.probe import evaluating
from ...pruning import importance
from ...pruning.calibration import LayerStream
from ...pruning.gradients import collect
from ...pruning.importance.uniqueness import similarity

THRESHOLD = 0.8
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CRITERIA = ("random", "magnitude-l2-both", "wanda", "wanda-unique", "flap", "taylor-neuron", "sensitivity")
_BINS = 20
_LARGEST = 5
_MEMBERS = 8


@dataclass(frozen=True)
class Redundancy:
    """What `neuron_redundancy` found.

    Attributes:
        threshold: of the similarity from which a neuron counts as redundant.
        keep: the share that each criterion keeps of every layer.
        windows, window: N and W of the text.
        layers: for each layer `layer`, `neurons`, `dead` (never active on the text), `uniqueness` (by the absolute
            cosine) and `uniqueness_signed`, `curve` (uniqueness over thresholds), `highest` (histogram, over 20 equal
            bins of [0, 1], of each neuron's highest similarity), `sensitivity` (mean, median, p90, largest, and
            `top_tenth`, the share of the sum that the tenth of most sensitive neurons have), `clusters` (of neurons
            linked by a similarity of at least the threshold: how many, the neurons in them, and the largest with
            their first members), `after`.
        all: the same over all neurons of the model, clusters apart.
        after: for each criterion, over all layers, of the neurons that it keeps: `uniqueness`, and `sensitivity`, the
            share of the sum before.
    """

    threshold: float
    keep: float
    windows: int
    window: int
    layers: list[dict[str, Any]]
    all: dict[str, Any]
    after: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def clusters(cosine: Tensor, threshold: float) -> list[list[int]]:
    """Groups of at least two neurons that a chain of similarities >= `threshold` links, the largest first.

    Args:
        cosine: `[F, F]`, symmetric, zero diagonal.
        threshold: above 0.
    """
    linked = cosine >= threshold
    members = linked.any(1).nonzero().flatten()
    if not len(members):
        return []
    near = linked[members][:, members].fill_diagonal_(True)
    labels = torch.arange(len(members), device=cosine.device)
    while True:  # each takes the lowest label that it or a neighbour has, until nobody does
        lowest = torch.where(near, labels, len(members)).amin(1)
        if torch.equal(lowest, labels):
            break
        labels = lowest
    groups: dict[int, list[int]] = {}
    for label, neuron in zip(labels.tolist(), members.tolist(), strict=True):
        groups.setdefault(label, []).append(neuron)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def _unique(cosine: Tensor, threshold: float) -> float:
    """The share of neurons with no similar one of a higher number (see `importance.uniqueness`)."""
    return 1.0 - float((cosine.triu(1) >= threshold).any(1).double().mean())


def _spread(values: Tensor) -> dict[str, float]:
    median, high = values.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    top = values.topk(max(1, len(values) // 10)).values.sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    whole = {"mean": float(values.mean()), "median": median, "p90": high, "largest": float(values.max())}
    return {**whole, "top_tenth": float(top)}


def _after(
    cosine: Tensor,
    sensitivity: Tensor,
    weights: FFNWeights,
    stats: ActivationStats,
    criteria: Sequence[str],
    keep: int,
    threshold: float,
    generator: torch.Generator,
) -> dict[str, dict[str, float]]:
    """What each criterion leaves of one layer."""
    found = {}
    for name in criteria:
        scores = importance.get(name)(weights, stats, generator)
        kept = scores.topk(keep).indices.sort().values
        at = kept.to(cosine.device)
        share = float(sensitivity[kept].sum() / sensitivity.sum()) if bool(sensitivity.any()) else 1.0
        found[name] = {"uniqueness": _unique(cosine[at][:, at], threshold), "sensitivity": share}
    return found


def _layer(ffn: FFN, cosine: Tensor, signed: float, stats: ActivationStats, threshold: float) -> dict[str, Any]:
    assert stats.gradients is not None
    groups = clusters(cosine, threshold)
    highest = cosine.amax(1).double().cpu().histc(_BINS, 0.0, 1.0)
    return {
        "layer": ffn.layer,
        "neurons": ffn.intermediate_size,
        "dead": int((stats.square_sum == 0).sum()),
        "uniqueness": _unique(cosine, threshold),
        "uniqueness_signed": signed,
        "curve": [{"threshold": t, "uniqueness": _unique(cosine, t)} for t in THRESHOLDS],
        "highest": [int(count) for count in highest],
        "sensitivity": _spread(stats.gradients.sample_taylor.double().cpu()),
        "clusters": {
            "count": len(groups),
            "neurons": sum(map(len, groups)),
            "largest": [{"size": len(group), "neurons": group[:_MEMBERS]} for group in groups[:_LARGEST]],
        },
    }


def _weighted(shares: list[float], parts: Sequence[float]) -> float:
    """The share of all, from those of parts of it; where there is nothing, as a part says."""
    whole = math.fsum(parts)
    return math.fsum(s * part for s, part in zip(shares, parts, strict=True)) / whole if whole else fmean(shares)


def _total(layers: list[dict[str, Any]], sensitivities: list[Tensor]) -> dict[str, Any]:
    count = sum(layer["neurons"] for layer in layers)

    def mean(values: Sequence[float]) -> float:
        return sum(v * layer["neurons"] for v, layer in zip(values, layers, strict=True)) / count

    return {
        "neurons": count,
        "dead": sum(layer["dead"] for layer in layers),
        "uniqueness": mean([layer["uniqueness"] for layer in layers]),
        "uniqueness_signed": mean([layer["uniqueness_signed"] for layer in layers]),
        "curve": [
            {"threshold": t, "uniqueness": mean([layer["curve"][i]["uniqueness"] for layer in layers])}
            for i, t in enumerate(THRESHOLDS)
        ],
        "highest": [sum(layer["highest"][i] for layer in layers) for i in range(_BINS)],
        "sensitivity": _spread(torch.cat(sensitivities)),
        "clusters": {name: sum(layer["clusters"][name] for layer in layers) for name in ("count", "neurons")},
    }


def _with(stats: ActivationStats, gradients: GradientStats) -> ActivationStats:
    return ActivationStats(stats.tokens, stats.mean, stats.abs_mean, stats.square_sum, stats.gram, gradients)


def neuron_redundancy(
    model: nn.Module,
    windows: Tensor,
    threshold: float = THRESHOLD,
    criteria: Sequence[str] = CRITERIA,
    keep: float = 0.7,
    seed: int = 0,
    progress: Progress = quiet,
) -> Redundancy:
    """Similarity and sensitivity of a model's FFN neurons on a text, and what criteria leave of them.

    Args:
        model: a causal LM of Transformers, not accelerated; unchanged.
        windows: `[N, W]` token ids; a window is a sample of the sensitivity.
        threshold: of the similarity, in (0, 1].
        criteria: names of `importance`; each keeps the same share of every layer, scored on the model as it is.
        keep: that share, in (0, 1].
        seed: of criteria that draw.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: a share or threshold out of range, an unknown criterion, windows longer than the context or of one
            token, a loss, gradients or activations that are not finite.
        UnsupportedModelError: an FFN that pyprune does not know, or layers that cannot be run one by one.
    """
    check(is_finite(threshold) and 0 < threshold <= 1, "threshold", "lie in (0, 1]", threshold)
    check(is_finite(keep) and 0 < keep <= 1, "keep", "lie in (0, 1]", keep)
    needs = {need for name in criteria for need in importance.get(name).needs}
    ids = stack_batches(windows, getattr(model.config, "vocab_size", None))
    check_windows(model, ids, "windows")
    ffns = find_ffns(model)
    gradients = collect(
        model, ffns, ids, parts="gradients" in needs, parts_square="gradients2" in needs, progress=progress
    )
    generator = torch.Generator().manual_seed(seed)
    layers: list[dict[str, Any]] = []
    with torch.no_grad(), evaluating(model):
        stream = LayerStream(model, ffns, ids)
        for ffn, gradient in zip(ffns, gradients, strict=True):
            progress("comparing neurons", ffn.layer, len(ffns))
            stats = _with(stream.statistics(ffn, gram=True), gradient)
            assert stats.gram is not None
            signed = _unique(similarity(stats.gram, signed=True), threshold)
            cosine = similarity(stats.gram)
            count = max(1, round(keep * ffn.intermediate_size))
            taylor = gradient.sample_taylor.double().cpu()
            after = _after(cosine, taylor, ffn.weights(), stats, criteria, count, threshold, generator)
            layers.append({**_layer(ffn, cosine, signed, stats, threshold), "after": after})
            stream.advance()
        progress("comparing neurons", len(ffns), len(ffns))
    sensitivities = [g.sample_taylor.double().cpu() for g in gradients]
    total = _total(layers, sensitivities)
    # Each layer counts by what its share is of: its neurons, and its sensitivity before.
    of = {"uniqueness": [n["neurons"] for n in layers], "sensitivity": [float(s.sum()) for s in sensitivities]}
    after = {
        name: {key: _weighted([layer["after"][name][key] for layer in layers], parts) for key, parts in of.items()}
        for name in criteria
    }
    return Redundancy(float(threshold), float(keep), len(ids), ids.shape[1], layers, total, after)
