"""Other ways to make an FFN cheap, for the same run: each a function from a `Layer` to a `Variant`, by name.

A rival that cannot run here says why by `Unavailable`; that is recorded and nothing else happens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.layers import Layer, Variant
from pyprune.base import reference
from pyprune.base.record import Record


class Unavailable(Exception):  # noqa: N818 - a reason, not an error
    """Why a rival is not measured, in one line."""


def liger(layer: Layer) -> Variant:
    """Liger's fused SwiGLU between torch's products."""
    if not layer.case.shape.gated or layer.case.shape.activation != "silu":
        raise Unavailable("Liger has SwiGLU only")
    try:
        swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    except ImportError as error:
        raise Unavailable(f"Liger cannot be imported ({error})") from error

    def run(x: Tensor, _b: None, _l: None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(swiglu.apply(F.linear(x, gate), F.linear(x, up)), down)

    f = layer.case.shape.intermediate_size
    calls = [lambda a=arguments: run(*a) for arguments in layer.dense_sets(f)]
    return Variant(calls, layer.bytes(f, layer.arena.dtype), "liger")


def _half(weight: Tensor) -> Tensor:
    """Zero two of every four neighbours, a pattern that 2:4 kernels accept."""
    kept = torch.tensor([1, 1, 0, 0], dtype=weight.dtype, device=weight.device).repeat(weight.shape[1] // 4)
    return weight * kept


def semi_structured(layer: Layer) -> Variant:
    """torch's 2:4 weights: all neurons, half of the weights of each."""
    if layer.arena.device.type != "cuda":
        raise Unavailable("2:4 weights need a CUDA device")
    f = layer.case.shape.intermediate_size
    act = reference.ACTIVATIONS[layer.case.shape.activation]
    found = []
    for x, bias, last, *weights in layer.dense_sets(f)[:2]:  # compressing takes time and memory of its own
        found.append((x, bias, last, *(torch.sparse.to_sparse_semi_structured(_half(w)) for w in weights)))

    def run(x: Tensor, bias: Tensor | None, last: Tensor | None, *weights: Tensor) -> Tensor:
        # These take matrices only.
        hidden = act(F.linear(x.flatten(0, 1), weights[0], bias))
        hidden = hidden if len(weights) == 2 else hidden * F.linear(x.flatten(0, 1), weights[1])
        return F.linear(hidden, weights[-1], last)

    # Half of the values and 2 bits for the place of each.
    size = layer.bytes(f, layer.arena.dtype)
    return Variant([lambda a=arguments: run(*a) for arguments in found], size // 2 + size // 16, "2:4")


def two_kernel_gather(layer: Layer) -> Variant:
    """Contextual sparsity as its systems run it: see gather_rival.py."""
    try:
        rival = importlib.import_module("bench.gpu.gather_rival")
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported ({error})") from error
    case, dtype = layer.case, layer.arena.dtype
    d, rows, gated = case.shape.hidden_size, case.shape.intermediate_size, case.shape.gated
    if case.tokens > 4 or case.shape.activation not in ("silu", "relu"):
        raise Unavailable("written for four tokens at most, SwiGLU and ReLU")
    if layer.arena.device.type != "cuda" and not rival.triton.knobs.runtime.interpret:
        raise Unavailable("Triton needs a CUDA device")
    read = layer.bytes(case.neurons, dtype, gather=True)
    sets = layer.arena.sets(dtype, *[(rows, d)] * (3 if gated else 2), read=read)
    bias, last, x = layer.normal(rows), layer.normal(d), layer.x.view(-1, d)

    def run(*weights: Tensor) -> Tensor:
        gate, (up, down) = weights[0] if gated else None, weights[-2:]
        return rival.two_kernel_gather(x, gate, up, down, bias, last, layer.neurons, case.shape.activation)

    def truth() -> tuple[Tensor, Tensor]:
        at = layer.neurons.long()
        kept, column = torch.cat([part[at] for part in sets[0]], 1), None if bias is None else bias[at, None]
        record = Record(kept, gated, case.shape.activation, None, column, last)
        return reference.ffn(x.double(), record), reference.ffn(x, record)

    return Variant([lambda w=w: run(*w) for w in sets], read, "rival", truth)


RIVALS: dict[str, Callable[[Layer], Variant]] = {
    "liger": liger,
    "2:4": semi_structured,
    "two-kernel gather": two_kernel_gather,
}
