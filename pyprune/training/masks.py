"""A mask on the neurons of one FFN while it trains, and what the methods learn from under it.

The weights stay dense and the model's own: a forward pre-hook on the down projection multiplies what enters it. So
a removed neuron reaches nothing and gets no gradient, but it can come back.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats
from ..model.families import FFN
from .statistics import StepStatistics


class _StraightThrough(torch.autograd.Function):
    """a' = a * m, with dL/dm_j = sum over tokens of a_tj * dL/da'_tj, for removed neurons (m_j = 0) too.

    Gates between 0 and 1 do as well. The sum runs in float32 at least, in one precision above what a half-width
    activation has.
    """

    @staticmethod
    def forward(ctx: Any, activations: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(activations, mask)
        return activations * mask.to(activations.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        activations, mask = ctx.saved_tensors
        products = activations.to(mask.dtype) * gradient.to(mask.dtype)
        return gradient * mask.to(gradient.dtype), products.flatten(0, -2).sum(0)


class NeuronMask:
    """The mask of one FFN.

    Args:
        ffn: where it goes.
        gradient: gather the straight-through gradient of the mask while training.
        moments: gather the products of neurons while training.
        needs: of `importance.base.NEEDS`: what of a criterion's statistics to gather while training.

    Attributes:
        keep: `[F]` bool, true for the neurons that work.
        products: `[F, F]`, sum over the tokens since `set` of a' a'^T, or None. a' are the masked activations, so
            removed neurons have zeros there.
    """

    def __init__(self, ffn: FFN, gradient: bool, moments: bool, needs: Set[str] = frozenset()) -> None:
        self.ffn = ffn
        self._step = StepStatistics(ffn, needs) if needs else None
        self._downs = ffn.downs
        self._gathers_gradient, self._gathers_moments = gradient, moments
        self.set(torch.ones(ffn.intermediate_size, dtype=torch.bool))
        self._handles = [down.register_forward_pre_hook(self._hook) for down in self._downs]

    def set(self, keep: Tensor, gates: Tensor | None = None) -> None:
        """Put the mask `keep` (`[F]` bool) in force, and forget what was gathered.

        Args:
            keep: in force where nothing trains; and in training, without `gates`.
            gates: `[F]`, what activations are multiplied by in training.
        """
        weight = self.ffn.weights().down
        self.keep = keep.to(weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mask = self.keep if gates is None else gates.detach().to(weight.device)
        self._mask = mask.to(dtype, copy=True).requires_grad_(self._gathers_gradient)
        self._still = self._mask.detach() if gates is None else self.keep.to(dtype)
        self.products: Tensor | None = None
        if self._step is not None:
            self._step.reset()

    def statistics(self, ranks: Ranks = ALONE) -> ActivationStats | None:
        """Of the passes since `set`; None where nobody asked for them. Raises as `StepStatistics.read`."""
        return None if self._step is None else self._step.read(ranks)

    @property
    def gradient(self) -> Tensor | None:
        """`[F]`, dL/dm summed over the backward passes since `set`; None before the first."""
        return self._mask.grad

    def remove(self) -> None:
        """Take the mask off the model."""
        for handle in self._handles:
            handle.remove()
        if self._step is not None:
            self._step.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not any(module is down for down in self._downs):
            return None  # a copy of the projection, as `probe` makes them: it has other neurons
        activations, *rest = args
        if not (module.training and torch.is_grad_enabled()):
            # Reentrant checkpoints train without gradients first: their loss must be of what is computed again.
            factor = self._mask.detach() if module.training else self._still
            return (activations * factor.to(activations), *rest)
        if self._gathers_gradient:
            masked = _StraightThrough.apply(activations, self._mask)
        else:
            masked = activations * self._mask.to(activations.dtype)
        if self._step is not None:
            self._step.see(activations, masked)
        if self._gathers_moments:
            self._add_products(masked.detach())
        return (masked, *rest)

    @torch.no_grad()
    def _add_products(self, activations: Tensor) -> None:
        # Autocast would multiply in half precision here.
        with torch.autocast(activations.device.type, enabled=False):
            flat = activations.reshape(-1, activations.shape[-1]).to(self._mask.dtype)
            products = flat.t() @ flat
        self.products = products if self.products is None else self.products + products
