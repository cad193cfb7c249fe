"""Optimizers across a cut: what they keep for a parameter loses the same rows or columns as the parameter."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Cut = tuple[nn.Parameter, int, Tensor, torch.Size]


class Optimizers:
    """Every torch optimizer that takes a step from now on until `stop`, through whatever wrapper."""

    def __init__(self) -> None:
        found: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._found = found
        handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: found.add(optimizer))
        self.stop = weakref.finalize(self, handle.remove)
        """Stop listening."""

    def follow(self, cuts: Iterable[Cut], others: Iterable[Any] = ()) -> None:
        """Cut what those optimizers and `others` keep for parameters that were cut (see `surgery.cut`).

        State of a parameter's shape, or of a size of 1 in some dimensions (a mean over them), keeps the slices that the
        parameter kept; single numbers stay.

        Warns:
            UserWarning: an optimizer keeps something else (8-bit or factored moments): what it keeps for the parameters
                that were cut is dropped, so that it begins anew with these.
        """
        cuts = list(cuts)
        own = {id(optimizer.state): optimizer for optimizer in map(_unwrapped, [*self._found, *others])}
        for optimizer in own.values():
            lost: list[str] = []
            for parameter, dim, index, shape in cuts:
                state = optimizer.state.get(parameter)
                if not state:
                    continue
                strange = [name for name, value in state.items() if not _fits(value, shape)]
                if strange:
                    lost.append(strange[0])
                    del optimizer.state[parameter]
                else:
                    state.update({name: _kept(value, dim, index, shape) for name, value in state.items()})
            if lost:
                warnings.warn(
                    f"{type(optimizer).__name__} keeps state that cannot be cut with the neurons ({lost[0]}): it was "
                    f"dropped for {len(lost)} parameters of FFNs, and begins anew with them",
                    stacklevel=4,
                )


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where it is wrapped as the package accelerate does."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _fits(value: Any, shape: torch.Size) -> bool:
    """Whether an optimizer's value for a parameter of `shape` can be cut with it."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, int | float | str)
    if type(value) not in (Tensor, nn.Parameter):
        return False
    same = value.ndim == len(shape) and all(n in (1, full) for n, full in zip(value.shape, shape, strict=True))
    return value.numel() == 1 or (same and value.is_floating_point())


@torch.no_grad()
def _kept(value: Any, dim: int, index: Tensor, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1 or value.shape[dim] != shape[dim]:
        return value
    return value.index_select(dim, index.to(value.device))
