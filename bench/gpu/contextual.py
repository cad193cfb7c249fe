"""The contextual gather: how many neurons are used is a number on the device, and so is which they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu.layers import Layer, Variant
from pyprune.ffn import dispatch, ops
from pyprune.ffn.backends import Call as Operands


def _variant(layer: Layer, backend: str, by_token: bool) -> Variant:
    """Room for every neuron, of which the case's share is used: the same for all tokens, or in a list for each."""
    size, tokens, kept = layer.case.shape.intermediate_size, layer.case.tokens, len(layer.neurons)
    index = torch.full((size,), size - 1, dtype=torch.int32, device=layer.x.device)
    index[:kept] = layer.neurons
    counts = tokens if by_token else 1
    count = torch.full((counts,), kept, dtype=torch.int32, device=layer.x.device)
    if by_token:
        index = index.repeat(tokens, 1)
    plain = layer.operands(True, layer.arena.dtype)
    form = {"gated": layer.case.shape.gated, "activation": layer.case.shape.activation, "backend": backend}

    def run(call: Operands) -> Tensor:
        biases = (call.neuron_bias, call.down_bias)
        return ops.contextual_ffn(call.x, call.record, index, count, *biases, scales=call.scales, **form)

    problem = layer.problem(True, layer.arena.dtype, contextual=True)
    return Variant(
        [lambda c=call: run(c) for call in plain],
        layer.bytes(kept, layer.arena.dtype, gather=True),
        dispatch.choose(problem, backend).backend.NAME,
        # Every token uses the same neurons, so it must come out as the gather over them.
        lambda: layer.truth(plain[0]),
    )


def contextual(layer: Layer) -> Iterator[tuple[str, Callable[[], Variant]]]:
    """By what `auto` takes, and by every backend that can; for two tokens and more also with a list for each."""
    problem = layer.problem(True, layer.arena.dtype, contextual=True)
    yield "contextual", lambda: _variant(layer, "auto", False)
    for name, backend in dispatch.backends().items():
        if backend.why_not(problem) is None:
            yield f"contextual:{name}", lambda name=name: _variant(layer, name, False)
            if layer.case.tokens > 1:
                yield f"contextual by token:{name}", lambda name=name: _variant(layer, name, True)
