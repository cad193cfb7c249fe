"""What one optimizer step shows of one FFN, in the form that importance criteria read.

The statistics are those of the batches of the step, and no pass over the model is added: hooks look at what training
computes anyway. A removed neuron is judged straight through its mask where only its activation counts (the moments,
`neuron_taylor`, `mask_square`: a_tj as it was before the mask, dL/da' behind it), and so it can come back; by its
weights' gradients, which are zero while it is removed (`sample_taylor`, `parts`, `parts_square`), its score only fades.
`parts` are the gradients that the optimizer gets: where the loop clips them, they are clipped, and all else is not.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats, GradientStats
from ..model.families import FFN
from ..pruning.gradients import NeuronSums, neuron_major
from ..pruning.moments import Moments


class StepStatistics:
    """Gathers the statistics of one FFN between `reset` and `read`.

    The loss of the step is taken for a mean over its samples, the rows of the batches; all tokens count, padding too.

    Args:
        ffn: whose; its input projections, and for `gradients2` its down projection, get forward hooks until `remove`.
        needs: what a criterion needs, keys of `importance.base.NEEDS`; nothing else is gathered.
    """

    def __init__(self, ffn: FFN, needs: Set[str]) -> None:
        self.ffn, self.needs = ffn, needs
        self._first = bool(needs & {"gradients", "gradients2"})
        self._second = "gradients2" in needs
        self._handles: list[Any] = []
        self._inputs: list[nn.Module] = [ffn.holder.get_submodule(name) for name, _ in ffn.pattern.inputs]
        self._batch = 1  # samples of the batch at hand, where the FFN gets its tokens flat
        if ffn.pattern.in_layer:
            self._handles.append(ffn.holder.register_forward_pre_hook(self._enter, with_kwargs=True))
        if self._first:
            start = 0
            for module, (_, blocks) in zip(self._inputs, ffn.pattern.inputs, strict=True):
                see = partial(self._see_input, module, start, blocks)
                self._handles.append(module.register_forward_hook(see))
                start += blocks
        if self._second:
            self._handles.append(ffn.down.register_forward_hook(partial(self._see_output, ffn.down)))
        self.reset()

    def reset(self) -> None:
        """Forget what was gathered."""
        down = self.ffn.weights().down
        size, hidden = down.shape
        self._moments = Moments(size, hidden, down.device, "gram" in self.needs, False)
        self._count = 0
        self._all = NeuronSums(size, down.device)
        self._own: Tensor | None = None  # [B, F], of each sample of the batch at hand: sum over its weights of w g
        self._missing = 0  # projections whose gradient has not come yet
        parts = len(self.ffn.weights().parts) if self._second else 0
        self._squares = [torch.zeros(size, hidden, dtype=torch.float64, device=down.device) for _ in range(parts)]

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = len(args[0] if args else kwargs["hidden_states"])

    def _split(self, tensor: Tensor) -> Tensor:
        """`[B, T, ...]` in float32 at least; tokens come as `[B, T, ...]`, or flat from a layer that has no module."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        return wide if wide.ndim > 2 else wide.reshape(self._batch, -1, wide.shape[-1])

    def see(self, activations: Tensor, masked: Tensor) -> None:
        """Take in what enters the down projection (`[..., F]`), before and after the mask, in a pass of training."""
        a = self._split(activations)
        if self.needs & {"activations", "gram"}:
            self._moments.add(a.flatten(0, 1), None)
        else:
            self._moments.tokens += a.shape[0] * a.shape[1]
        self._count += len(a)
        if self._first and masked.requires_grad:
            masked.register_hook(partial(self._see_gradient, a, masked.detach()))

    def _see_gradient(self, a: Tensor, masked: Tensor, gradient: Tensor) -> None:
        g = self._split(gradient)
        products = a * g
        self._all.add_activations(products.abs().sum((0, 1), dtype=torch.float64), products.sum(1).double())
        # The down row's part of w g; the rows that lead in follow, for the backward pass gets to them later.
        self._own, self._missing = (self._split(masked) * g).sum(1).double(), len(self._inputs)

    def _see_input(self, own: nn.Module, start: int, blocks: int, module: nn.Module, args: Any, out: Tensor) -> None:
        if module is not own or not out.requires_grad:
            return  # a copy of the projection, as `probe` makes them; or a pass that nothing is learned from
        x = self._split(args[0]) if self._second else None
        out.register_hook(partial(self._see_input_gradient, start, blocks, x, out.detach()))

    def _see_input_gradient(self, start: int, blocks: int, x: Tensor | None, out: Tensor, gradient: Tensor) -> None:
        if self._own is None:
            return  # a forward pass that this object was not shown
        g = self._split(gradient)
        # u = U x + b, so sum over tokens of u g = sum over row and bias of w dL/dw.
        products = (self._split(out) * g).sum(1).double()  # [B, blocks * F]
        self._own += products.view(len(products), blocks, -1).sum(1)
        if x is not None:
            for i, part in enumerate(g.chunk(blocks, -1)):
                self._add_squares(start + i, part, x)
        self._missing -= 1
        if self._missing == 0:
            self._all.add_weights(self._own)
            self._own = None

    def _see_output(self, own: nn.Module, module: nn.Module, args: Any, out: Tensor) -> None:
        if module is own and out.requires_grad:
            masked = self._split(args[0])
            out.register_hook(lambda gradient: self._add_squares(-1, masked, self._split(gradient)))

    def _add_squares(self, part: int, left: Tensor, right: Tensor) -> None:
        """Add the squared gradients of single samples: left `[B, T, F]` by right `[B, T, D]`, one sample at a time."""
        for a, b in zip(left, right, strict=True):
            self._squares[part] += (a.t() @ b).double().square()

    def read(self, ranks: Ranks = ALONE) -> ActivationStats:
        """What was gathered, by all `ranks`, once after each `reset`. Moments that nobody asked for are NaN.

        Raises:
            InputError: no forward pass or, where gradients are asked for, no backward pass since `reset`; FFN weights
                that do not train; activations or gradients that are not finite.
        """
        layer = self.ffn.layer
        self._moments.share(ranks)
        if self._moments.second[0] is not None:
            ranks.add(self._moments.second[0])
        tokens = self._moments.tokens
        check(tokens > 0, f"statistics of layer {layer}", "follow a pass of the model in training mode", "no tokens")
        if self.needs & {"activations", "gram"}:
            stats = self._moments.to_stats()
            self._check_finite("activations", stats.square_sum)
        else:
            unknown = torch.full_like(self._all.sums[0], torch.nan)
            stats = ActivationStats(tokens, unknown, unknown, unknown)
        if not self._first:
            return stats
        return ActivationStats(
            tokens, stats.mean, stats.abs_mean, stats.square_sum, stats.gram, gradients=self._gradients(tokens, ranks)
        )

    def _gradients(self, tokens: int, ranks: Ranks) -> GradientStats:
        rule = "have gradients: the criterion needs FFN weights that train, and a backward pass before `step`"
        for parameter in (p for module in (*self._inputs, self.ffn.down) for p in module.parameters()):
            check(parameter.grad is not None, f"weights of layer {self.ffn.layer}", rule, None)
        parts = neuron_major(self.ffn, lambda parameter: parameter.grad.detach())[0]
        self._check_finite("gradients", self._all.sums)
        # What came is the derivative of the mean over n samples, so a sample's own loss has n times that.
        n = self._count
        total = torch.tensor([n])
        ranks.add(total)
        share = n / int(total)  # the samples of this rank, of all
        absolute, square, own = self._all.sums
        sums = [absolute * n, square * n * share, own * share, *(n * share * s for s in self._squares)]
        ranks.add(*sums)
        absolute, square, own, *squares = sums
        return GradientStats(int(total), tokens, absolute / tokens, square, own, tuple(parts), tuple(squares))

    def _check_finite(self, what: str, values: Tensor) -> None:
        bad = int((~values.reshape(-1, values.shape[-1]).isfinite().all(0)).sum())
        message = f"be finite; of {values.shape[-1]} neurons these many are not"
        check(bad == 0, f"{what} of layer {self.ffn.layer}", message, bad)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
