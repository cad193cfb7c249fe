"""Experts of a layer run alone: every token goes to as many random experts as the model's router picks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ffn.moe import PrunedMoE
from ..model.experts import Bank

# A step goes to other experts than the one before, so that no cache holds their weights.
_ROUTINGS = 16
_number = itertools.count()


@functools.lru_cache(maxsize=64)
def _routings(experts: int, picked: int, tokens: int, device: torch.device) -> list[Tensor]:
    """Experts of each token, `[tokens, picked]` int64, of several steps."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = (torch.rand(tokens, experts, generator=generator).argsort(1)[:, :picked] for _ in range(_ROUTINGS))
    return [index.contiguous().to(device) for index in drawn]


@functools.lru_cache(maxsize=64)
def _visits(experts: int, picked: int, tokens: int, device: torch.device) -> list[list[tuple[int, Tensor]]]:
    """The same by expert: those that a step names, each with its tokens."""
    steps = _routings(experts, picked, tokens, torch.device("cpu"))
    return [[(int(e), (index == e).any(1).nonzero().flatten().to(device)) for e in index.unique()] for index in steps]


@dataclass(frozen=True, eq=False)
class Routed:
    """The experts of one layer.

    Attributes:
        call: of hidden states `[1, M, D]` and one of `draw`'s steps.
        draw: the steps for (experts, picked, tokens, device), which take turns.
        experts, picked: E, and to how many of them a token goes.
        hidden_size, size: D and F, of each.
        bytes: of the weights of one.
    """

    call: Callable[..., object]
    draw: Callable[[int, int, int, torch.device], Sequence[object]]
    experts: int
    picked: int
    hidden_size: int
    size: int
    bytes: int
    # Layers begin with different steps.
    turn: Iterator[int] = field(default_factory=lambda: itertools.count(next(_number)))

    def active(self, tokens: int) -> float:
        """How many experts a call with so many tokens names, in the mean over routings."""
        return self.experts * (1 - (1 - self.picked / self.experts) ** tokens)

    def __call__(self, x: Tensor) -> object:
        """Run the experts on `[1, M, D]`."""
        steps = self.draw(self.experts, self.picked, x.shape[1], x.device)
        return self.call(x, steps[next(self.turn) % len(steps)])


def _weights(x: Tensor, index: Tensor) -> Tensor:
    return torch.full(index.shape, 1 / index.shape[1], dtype=x.dtype, device=x.device)


def of_bank(bank: Bank, picked: int) -> Routed:
    """The experts of a module that has them in tensors."""
    module, experts = bank.module, bank.experts

    def call(x: Tensor, index: Tensor) -> object:
        if bank.layout.sorted_rows:
            return module(x[0].repeat(experts, 1))
        return module(x if bank.layout.flat else x[0], index, _weights(x, index))

    # Where rows come sorted by expert, every expert runs on every token.
    picked = experts if bank.layout.sorted_rows else picked
    own = bank.weights(0)
    nbytes = sum(t.nbytes for t in vars(own).values() if t is not None)
    return Routed(call, _routings, experts, picked, own.down.shape[1], bank.size, nbytes)


def of_records(module: PrunedMoE, picked: int) -> Routed:
    """The experts of a `PrunedMoE`; in gather mode with the neurons that run of them, in the mean."""

    def call(x: Tensor, index: Tensor) -> object:
        return module(x, index, _weights(x, index))

    neurons = module.intermediate_size if module.counts is None else round(float(module.counts.float().mean()))
    return Routed(call, _routings, module.num_experts, picked, module.hidden_size, neurons, module.experts.nbytes)


def of_list(modules: Sequence[nn.Module], picked: int, hidden_size: int, size: int, nbytes: int) -> Routed:
    """Experts that are modules of their own, each run on its rows."""

    def call(x: Tensor, visits: Sequence[tuple[int, Tensor]]) -> object:
        return [modules[expert](x[0, tokens]) for expert, tokens in visits]

    return Routed(call, _visits, len(modules), min(picked, len(modules)), hidden_size, size, nbytes)
