"""Sums over samples of what gradients say of an FFN's neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.statistics import GradientStats


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class NeuronSums:
    """What gradients say of F neurons, summed over samples: windows, or the rows of a batch.

    Attributes:
        sums: `[3, F]` float64: over tokens abs(a g), over samples the square of sum a g, and abs of their sum w g.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, size, dtype=torch.float64, device=device)

    def add_activations(self, absolute: Tensor, of_samples: Tensor) -> None:
        """Take in `[F]`, sum over all tokens of abs(a g), and `[B, F]`, of each sample the sum of a g."""
        self.sums[0] += absolute
        self.sums[1] += of_samples.square().sum(0)

    def add_weights(self, of_samples: Tensor) -> None:
        """Take in `[B, F]`: of each sample the sum of w g over all weights of a neuron."""
        self.sums[2] += of_samples.abs().sum(0)


def finished(
    of: NeuronSums, parts: list[Tensor], parts_square: list[Tensor], samples: int, tokens: int, predictions: int
) -> GradientStats:
    """Means, of the mean loss over a window's predictions; the sums of `parts` are divided in place."""
    absolute, square, own = of.sums
    for part in parts:
        part /= samples * predictions
    for part in parts_square:
        part /= samples * predictions**2
    return GradientStats(
        samples,
        tokens,
        absolute / (tokens * predictions),
        square / (samples * predictions**2),
        own / (samples * predictions),
        tuple(parts),
        tuple(parts_square),
    )
