"""Trying an FFN module out: does it compute what its projections suggest, and with which activation?"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import reference
from .heterogeneous import narrow
from .patterns import FFNWeights, Pattern, projections


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _reference_output(weights: FFNWeights, x: Tensor, activation: str) -> Tensor:
    act = reference.ACTIVATIONS[activation]
    linear = nn.functional.linear
    hidden = act(linear(x, weights.parts[0], weights.input_biases[0]))
    if weights.gate is not None:
        hidden = hidden * linear(x, weights.up, weights.up_bias)
    return linear(hidden, weights.down.t(), weights.down_bias)


def _copy(module: Any) -> Any:
    """A shallow copy that computes with what is in the copy.

    A forward that was set on the module itself, as the hooks of the package accelerate are, would go on computing with
    the module's own weights, and move what it gets to their device.
    """
    small = copy.copy(module)
    own: dict[str, Any] = small.__dict__
    forward = own.pop("forward", None)
    if own.pop("_hf_hook", None) is not None:
        forward = own.pop("_old_forward", None)
    if forward is not None and getattr(forward, "__self__", None) is not module:
        own["forward"] = forward
    elif forward is not None:
        own["forward"] = MethodType(forward.__func__, small)
    return small


def _small_projection(projection: Any, inputs: int, outputs: int, generator: torch.Generator) -> Any:
    """A copy of a Linear or Conv1D, or of a subclass with its own forward, with small random float64 weights."""
    small = _copy(projection)
    small._parameters = {}
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    small.weight = nn.Parameter(weight.t().contiguous() if isinstance(projection, Conv1D) else weight)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64) / 4
    small.bias = None if projection.bias is None else nn.Parameter(bias)
    small.nx, small.nf = small.in_features, small.out_features = inputs, outputs
    return small


def _miniature(holder: nn.Module, pattern: Pattern, neurons: int = 24, hidden: int = 8) -> nn.Module:
    """A shallow copy of an FFN module with small random projections; everything else in it is the module's own.

    The first neurons have the same weights, however many there are.
    """
    generator = torch.Generator().manual_seed(0)
    small = _copy(holder)
    small._modules = {name: _copy(module) for name, module in holder._modules.items()}

    def put(name: str, projection: Any) -> None:
        parent, _, last = name.rpartition(".")
        inside = small.get_submodule(parent)
        if parent:  # a copy of its own, whose children may be exchanged
            inside._modules = dict(inside._modules)
        inside._modules[last] = projection

    for name, blocks in pattern.inputs:
        full = _small_projection(holder.get_submodule(name), hidden, blocks * _MOST, generator)
        put(name, _cut(full, neurons, blocks, "out"))
    put(
        pattern.down,
        _cut(_small_projection(holder.get_submodule(pattern.down), _MOST, hidden, generator), neurons, 1, "in"),
    )
    return small


# Neurons of the largest miniature.
_MOST = 24


def _cut(projection: Any, neurons: int, blocks: int, side: str) -> Any:
    """Of a projection of `_MOST` neurons, the first."""
    index = torch.cat([torch.arange(neurons) + block * _MOST for block in range(blocks)])
    narrow(projection, index, side)
    if side == "out":
        projection.nf = projection.out_features = len(index)
    else:
        projection.nx = projection.in_features = len(index)
    return projection


def _same(got: Any, want: Tensor) -> bool:
    """Whether every row agrees to 1e-6 of its norm: float64 is far closer, two different activations are not."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    error = torch.linalg.vector_norm(got - want, dim=-1)
    return bool((error <= 1e-6 * torch.linalg.vector_norm(want, dim=-1)).all())


# Whatever a module that is no FFN raises when it gets a hidden state alone.
_NO_FFN = (TypeError, ValueError, IndexError, RuntimeError, KeyError, AttributeError)


def _inputs(hidden: int = 8) -> Tensor:
    """From small values, which tell smooth activations apart, to large ones, which tell clipped ones from unclipped."""
    x = torch.randn(2, 8, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[1] *= 16
    return x


def detect_activation(holder: nn.Module, pattern: Pattern) -> str | None:
    """Name the activation by behaviour: run the module (in_layer: its activation) and compare.

    The module runs in float64 over small random weights instead of its own, so neither its dtype nor its size nor
    dead weights blur the answer.
    """
    if pattern.in_layer:
        act = getattr(holder, "activation_fn", None)
        if act is None:
            return None
        x = torch.linspace(-1, 1, 97, dtype=torch.float64) * torch.tensor([[2.0], [20.0]], dtype=torch.float64)
        got = act(x)
        return next((name for name, fn in reference.ACTIVATIONS.items() if _same(got, fn(x))), None)
    x = _inputs()
    try:
        with evaluating(holder):
            small = _miniature(holder, pattern)
            got = small(x)
    except _NO_FFN:
        return None  # it wants more than a hidden state, so it is no FFN that a record can stand for
    weights = projections(small, pattern)
    return next((n for n in reference.ACTIVATIONS if _same(got, _reference_output(weights, x, n))), None)


@torch.no_grad()
def prunable(holder: nn.Module, pattern: Pattern) -> bool:
    """Whether neurons of an FFN may be removed, whatever its activation: each is computed without the others.

    A copy with half of the neurons must have their values as one with all, and what enters the down projection must
    leave the module as that gives it, but for a residual that the module is handed and adds.
    """
    if pattern.in_layer:
        return False
    hidden = projections(holder, pattern).down.shape[1]  # norms inside are of this size
    x = _inputs(hidden)
    more = x.flip(0) / 3
    seen: list[Tensor] = []
    try:
        with evaluating(holder):
            for neurons in (_MOST, _MOST // 2):
                small = _miniature(holder, pattern, neurons, hidden)
                down: Any = small.get_submodule(pattern.down)
                down._forward_pre_hooks, down._forward_hooks = OrderedDict(), OrderedDict()
                handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
                asks = [p for p in inspect.signature(small.forward).parameters.values() if p.default is p.empty]
                residual = [more] * (sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in asks) - 1)
                got = small(x, *residual)
                handle.remove()
                got = got[0] if isinstance(got, tuple) else got
                if len(residual) > 1 or not _same(got, down(seen[-1]) + sum(residual)):
                    return False
    except _NO_FFN:
        return False
    return _same(seen[0][..., : _MOST // 2], seen[1])
