"""Zero neurons: an FFN with more of them computes the same, for whatever they hold, their down rows are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.families import FFN
from ..model.patterns import FFNWeights


def padded(ffn: FFN, width: int) -> FFNWeights:
    """Copies of an FFN's weights with zero neurons after its own.

    Args:
        ffn: an FFN of F neurons.
        width: how many neurons the copies have, at least F.
    """
    own = ffn.weights()
    more = width - own.down.shape[0]

    def rows(part: Tensor) -> Tensor:
        return functional.pad(part.detach(), (0, 0, 0, more))

    def values(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else functional.pad(bias.detach(), (0, more))

    gate = None if own.gate is None else rows(own.gate)
    down_bias = None if own.down_bias is None else own.down_bias.detach().clone()
    return FFNWeights(rows(own.up), rows(own.down), gate, values(own.up_bias), values(own.gate_bias), down_bias)


@torch.no_grad()
def widen(ffn: FFN, width: int) -> None:
    """Give an FFN zero neurons until it has `width`, in place: its projections get new parameters."""
    new = padded(ffn, width)

    def write(name: str, weight: Tensor, bias: Tensor | None) -> None:
        module: Any = ffn.holder.get_submodule(name)
        if not isinstance(module, nn.Linear):  # Conv1D of Transformers: [in, out]
            module.weight = nn.Parameter(weight.t().contiguous())
            module.nx, module.nf = weight.shape[1], weight.shape[0]
        else:
            module.weight = nn.Parameter(weight.contiguous())
            module.out_features, module.in_features = weight.shape
        if bias is not None:
            module.bias = nn.Parameter(bias)

    pattern = ffn.pattern
    if pattern.fused:
        assert new.gate is not None
        bias = None if new.up_bias is None or new.gate_bias is None else torch.cat([new.gate_bias, new.up_bias])
        write(pattern.up, torch.cat([new.gate, new.up]), bias)
    else:
        write(pattern.up, new.up, new.up_bias)
        if pattern.gate:
            assert new.gate is not None
            write(pattern.gate, new.gate, new.gate_bias)
    write(pattern.down, new.down.t(), new.down_bias)
    holder: Any = ffn.holder
    if hasattr(holder, "intermediate_size"):
        holder.intermediate_size = width
