"""The mean of what was removed, in the down bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model import surgery
from ...model.described import Described
from .base import REPAIRS, Fitted, Layer, Repair


def mean_bias(down: Tensor, stats: ActivationStats, removed: Tensor) -> Tensor:
    """`[D]`: sum over removed neurons of mean(a_j) V_j (FLAP, An et al. 2023, arXiv 2312.11983, section 3).

    The router's weights scale the bias of an expert too, so it gets the mean over them.
    """
    return stats.mean[removed] @ down[removed].double() / max(stats.routed, 1e-12)


@REPAIRS.add
@dataclass(frozen=True, kw_only=True)
class MeanBias(Repair):
    """The mean contribution of the removed neurons goes into the down bias."""

    NAME = "bias"
    SUMMARY = "the mean contribution of the removed neurons goes into the down bias"
    SOURCE = "An et al. 2023 (FLAP), arXiv 2312.11983, section 3"
    STRUCTURES = frozenset({"ffn", "experts"})

    def check_model(self, described: Described) -> None:
        surgery.check_biases(described.model, described.ffns)

    def prepare(self, described: Described) -> None:
        surgery.give_biases(described.model, described.ffns)

    def fit(self, layer: Layer) -> Fitted:
        down = layer.ffn.weights().down
        removed = torch.ones(len(down), dtype=torch.bool, device=down.device)
        removed[layer.kept] = False
        return Fitted(bias_shift=mean_bias(down, layer.stats, removed))
