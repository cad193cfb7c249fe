"""What a bench of experts measures: mixtures with some neurons kept, random routings, and a case of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import error
from bench.gpu.timing import Call, Replay
from bench.mixtures import Shape
from pyprune.base import reference
from pyprune.ffn.moe import PrunedMoE
from pyprune.model.experts import find_bank
from pyprune.model.mask import KeepIndex

ROUTINGS = 16


@dataclass
class Layers:
    """A mixture with so many neurons kept: two layers, as Transformers has them and as PrunedMoE."""

    shape: Shape
    keep: float
    own: list[Any]
    records: list[PrunedMoE]
    gathers: list[PrunedMoE] = field(default_factory=list)  # as many neurons of records that have all

    @classmethod
    def make(cls, shape: Shape, keep: float, device: torch.device) -> Layers:
        own = [cls._module(shape, keep, device) for _ in range(shape.layers)]
        found = cls(shape, keep, own, [cls._record(shape, module) for module in own])
        if keep < 1:
            generator = torch.Generator().manual_seed(0)
            size, count = shape.intermediate_size, round(keep * shape.intermediate_size)
            for _ in own:
                record = cls._record(shape, cls._module(shape, 1.0, device))
                scores = torch.rand(shape.experts, size, generator=generator)
                record.set_keep([KeepIndex.from_scores(one, count) for one in scores])
                found.gathers.append(record)
        return found

    @staticmethod
    def _module(shape: Shape, keep: float, device: torch.device) -> Any:
        module = shape.empty(keep, device)
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
        return module

    @staticmethod
    def _record(shape: Shape, module: Any) -> PrunedMoE:
        bank = find_bank(shape.name, module)
        assert bank is not None
        return PrunedMoE.from_bank(bank, backend="triton", picked=shape.picked)


@dataclass
class Routings:
    """Operands of several steps: `[M, D]` hidden states, and for each token other random experts."""

    x: list[Tensor]
    index: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def make(cls, shape: Shape, tokens: int, device: torch.device, count: int = ROUTINGS) -> Routings:
        generator = torch.Generator(device).manual_seed(tokens)
        found = cls([], [], [])
        for _ in range(count):
            scores = torch.rand(tokens, shape.experts, device=device, generator=generator)
            found.x.append(torch.randn(tokens, shape.hidden_size, device=device, generator=generator).bfloat16())
            found.index.append(scores.argsort(1)[:, : shape.picked].contiguous())
            found.weights.append(torch.full((tokens, shape.picked), 1 / shape.picked, device=device).bfloat16())
        return found

    def calls(self, run: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> list[Call]:
        """`run(i, x, index, weights)` for each step."""
        given = zip(self.x, self.index, self.weights, strict=True)
        return [lambda i=i, a=arguments: run(i, *a) for i, arguments in enumerate(given)]

    def active(self) -> float:
        """Experts that a step names, on average."""
        return sum(len(index.unique()) for index in self.index) / len(self.index)


@dataclass
class Case:
    """One case as it is measured."""

    layers: Layers
    tokens: int
    routings: Routings
    row: dict[str, Any]
    replays: dict[str, Replay] = field(default_factory=dict)
    _truth: dict[bool, tuple[Tensor, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.layers.shape.name} M {self.tokens} keep {self.layers.keep:g}"

    def truth(self, gather: bool = False) -> tuple[Tensor, float]:
        """The first call in float64, and torch's own error."""
        if gather not in self._truth:
            records = self.layers.gathers if gather else self.layers.records
            experts, given = records[0].experts, self.routings
            x, index, weights = given.x[0], given.index[0], given.weights[0]
            exact = reference.moe(x.double(), experts, index, weights.double())
            self._truth[gather] = exact, error(reference.moe(x, experts, index, weights), exact)
        return self._truth[gather]
