"""How the loss depends on the neurons of a bank of experts (see `gradients.collect`)."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from ..base.statistics import GradientStats
from ..model.experts import Bank
from ..model.narrowing import replaced
from ..model.units import Expert
from .gradient_sums import NeuronSums, finished, wide


class BankGradients:
    """Hooks on a bank, which runs written out meanwhile, and the sums over what they saw, expert by expert.

    Args:
        bank: the experts.
        first: the first of them, which messages name.
        parts, parts_square: as for `gradients.collect`.
    """

    activation: Tensor | None = None

    def __init__(self, bank: Bank, first: Expert, parts: bool, parts_square: bool) -> None:
        self.bank, self.ffn = bank, first
        weights = [wide(w.detach()) for w in bank.all_weights().parts]
        self.parts = [torch.zeros_like(w) for w in weights] if parts else []
        self.parts_square = [torch.zeros_like(w) for w in weights] if parts_square else []
        self.all = [NeuronSums(bank.size, weights[0].device) for _ in range(bank.experts)]
        self.window = torch.zeros(bank.experts, 3, bank.size, dtype=torch.float64, device=weights[0].device)
        self.parameters: list[nn.Parameter] = [bank.tensor(name) for name, *_ in bank.sides()]  # type: ignore[misc]
        self._stack = ExitStack()

    def hook(self) -> list[Any]:
        """Start watching; gives the handles."""
        self._stack.enter_context(replaced(self.bank.module, partial(self.bank.forward, see=self._enter)))
        return [*(p.register_post_accumulate_grad_hook(self._collect) for p in self.parameters), self]

    def remove(self) -> None:
        """Let the bank run as it did."""
        self._stack.close()

    def _enter(self, expert: int, a: Tensor) -> None:
        own = a.detach()
        if a.requires_grad and len(a):
            a.register_hook(partial(self._leave, expert, own))

    def _leave(self, expert: int, a: Tensor, gradient: Tensor) -> None:
        product = wide(a) * wide(gradient)
        self.window[expert, 0] += product.abs().sum(0, dtype=torch.float64)
        self.window[expert, 1] += product.sum(0, dtype=torch.float64)

    def _collect(self, _: Tensor) -> None:
        gradients = self.bank.of_gradients()
        if gradients is None:
            return
        weights, found = self.bank.all_weights(), gradients.all_weights()
        experts = self.bank.experts
        for w, g in zip(weights.input_biases, found.input_biases, strict=True):
            if w is not None and g is not None:
                self.window[:, 2] += (w.detach().double() * g.double())[:experts]
        for i, (w, g) in enumerate(zip(weights.parts, found.parts, strict=True)):
            w, g = w.detach()[:experts], g[:experts]
            self.window[:, 2] += (wide(w) * wide(g)).sum(2, dtype=torch.float64)
            if self.parts:
                self.parts[i][:experts] += g
            if self.parts_square:
                self.parts_square[i][:experts] += wide(g).square()
        for p in self.parameters:
            p.grad = None

    def close_window(self) -> None:
        """Add the window's sums to those of all windows."""
        finite = bool(self.window.isfinite().all())
        check(finite, f"gradients of {self.bank.name}", "be finite", "NaN or infinity")
        for one, sums in zip(self.all, self.window, strict=True):
            one.add_activations(sums[0], sums[None, 1])
            one.add_weights(sums[None, 2])
        self.window.zero_()

    def all_stats(self, samples: int, tokens: int, predictions: int) -> list[GradientStats]:
        """Of every expert; one that no token reached has zeros."""
        some = any(bool(one.sums[0].any()) for one in self.all)
        check(some, f"gradients of {self.bank.name}", "not all be zero, or no neuron can be ranked", 0.0)
        return [
            finished(one, [p[e] for p in self.parts], [p[e] for p in self.parts_square], samples, tokens, predictions)
            for e, one in enumerate(self.all)
        ]
