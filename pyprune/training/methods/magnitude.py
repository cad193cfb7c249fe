"""Gradual magnitude pruning: the L2 norm of a neuron's weights, taken anew at every step, before the optimizer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...model.families import FFN
from ...model.weights import whole
from .base import METHODS, Gathered, Method, Moment, State


@METHODS.add
@dataclass(frozen=True)
class Magnitude(Method):
    """Removed neurons keep their weights, and return when others shrink below them.

    The public code of Santacroce et al. ranks the rows of the up projection and the columns of the down projection
    apart; here they are one neuron, biases not counted, as in the one-shot criterion `magnitude-l2-both`.
    """

    NAME: ClassVar[str] = "magnitude"
    SUMMARY: ClassVar[str] = "L2 norm of a neuron's weights, all parts concatenated"
    SOURCE: ClassVar[str] = "Zhu and Gupta 2017, arXiv 1710.01878; of neurons: Santacroce et al. 2023, arXiv 2302.03773"

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        squares = [whole(part.detach().float().square().sum(1)) for part in ffn.weights().parts]
        return {"scores": torch.stack(squares).sum(0).sqrt()}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        state.update(self.start(gathered.ffn, torch.Generator()))
