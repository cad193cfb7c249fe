"""What a module gives to the hidden state: put in its place, and whether it arrives there as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.units import FFN


@contextmanager
def constant_output(ffn: FFN, value: Tensor | None = None) -> Iterator[None]:
    """Inside the block, `ffn` gives `value` (`[D]`) for every token; None for zeros."""

    def substitute(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output) if value is None else value.to(output).expand_as(output)

    handle = ffn.down.register_forward_hook(substitute)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def adds_output(module: nn.Module, forward: Callable[[], Tensor]) -> bool:
    """Whether what `module` puts out is added to what `forward` gives as it is: no norm, no multiplier between.

    Args:
        module: a down projection.
        forward: runs a layer that holds it; its hidden state, of the shape of the module's output but for batch
            dimensions of 1.
    """
    outputs: list[Tensor] = []
    change = torch.zeros(())

    def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        outputs.append(out)
        return out + change.to(out)

    handle = module.register_forward_hook(add)
    try:
        plain = forward()
        out = outputs[0]
        # As large as what is put out, or rounding would hide it.
        scale = out.float().square().mean().sqrt().clamp_min(1)
        change = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(scale) * scale
        changed = forward()
    finally:
        handle.remove()
    # What adding rounds, value by value: beside one large channel every other one must tell. Where a branch beside this
    # one and the residual cancel, a few round as a larger sum did.
    unit = max(torch.finfo(tensor.dtype).eps for tensor in (plain, out))
    size = plain.abs().float() + (out.abs().float() + change.abs()).view_as(plain)
    error = ((changed - plain).float() - change.view_as(plain)).abs()
    return float((error <= 1e-4 * scale + 4 * unit * size).float().mean()) > 0.99
