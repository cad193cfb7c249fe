"""Gradual random pruning: one random order, drawn at the start and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...model.families import FFN
from .base import METHODS, Gathered, Method, Moment, State


@METHODS.add
@dataclass(frozen=True)
class Random(Method):
    """The baseline that every method has to beat."""

    NAME: ClassVar[str] = "random"
    SUMMARY: ClassVar[str] = "one random order, seeded, frozen at the start"
    SOURCE: ClassVar[str] = "Santacroce et al. 2023, arXiv 2302.03773"

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        return {"scores": torch.rand(ffn.intermediate_size, generator=generator).to(ffn.weights().down.device)}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        pass
