"""How each family of models spells its FFN: one table of patterns, and neuron-major views of what a pattern names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Pattern:
    """How one family of models spells its FFN.

    Attributes:
        name: for messages and tables.
        up, down, gate: names of the projections, dotted where they lie deeper; `gate` is None for a plain FFN.
        fused: `up` holds gate and up stacked, gate first.
        in_layer: the projections are children of the decoder layer itself; no FFN module stands between.
    """

    name: str
    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    in_layer: bool = False

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """Projections into the FFN, each with the number of neuron blocks stacked in it, in record order."""
        if self.fused:
            return ((self.up, 2),)
        return ((self.gate, 1), (self.up, 1)) if self.gate else ((self.up, 1),)


PATTERNS: tuple[Pattern, ...] = (
    Pattern("gate_proj/up_proj/down_proj", gate="gate_proj", up="up_proj", down="down_proj"),
    Pattern("gate_up_proj/down_proj", up="gate_up_proj", down="down_proj", fused=True),
    Pattern("w1/w3/w2", gate="w1", up="w3", down="w2"),
    Pattern("up_proj/down_proj", up="up_proj", down="down_proj"),
    Pattern("c_fc/c_proj", up="c_fc", down="c_proj"),
    Pattern("fc_in/fc_out", up="fc_in", down="fc_out"),
    Pattern("dense_h_to_4h/dense_4h_to_h", up="dense_h_to_4h", down="dense_4h_to_h"),
    Pattern("fc1/fc2", up="fc1", down="fc2"),
    Pattern("fc1/fc2, gated", up="fc1", down="fc2", fused=True),
    Pattern("fc1/fc2 in the layer", up="fc1", down="fc2", in_layer=True),
    Pattern("wi_0/wi_1/wo", gate="wi_0", up="wi_1", down="wo"),
    Pattern("wi/wo", up="wi", down="wo"),
    Pattern("Wi/Wo", up="Wi", down="Wo", fused=True),
    Pattern("w_in.w_0/w_in.w_1/w_out", gate="w_in.w_0", up="w_in.w_1", down="w_out"),
    Pattern("input_linear/output_linear", up="input_linear", down="output_linear", fused=True),
    Pattern("linear_1/linear_2", up="linear_1", down="linear_2"),
    Pattern("intermediate/output", up="intermediate", down="output"),
    Pattern("0/2", up="0", down="2"),
)


@dataclass(frozen=True)
class FFNWeights:
    """Neuron-major views of one FFN's weights.

    Attributes:
        up, down: `[F, D]`; row j belongs to neuron j.
        gate: `[F, D]`, or None for a plain FFN.
        up_bias, gate_bias: `[F]` or None.
        down_bias: `[D]` or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The parts of a neuron-major record, in order: (gate, up, down) or (up, down), each `[F, D]`."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def input_biases(self) -> tuple[Tensor | None, ...]:
        """(gate_bias, up_bias) or (up_bias,), each `[F]` or None."""
        return (self.up_bias,) if self.gate is None else (self.gate_bias, self.up_bias)


def projections(holder: nn.Module, pattern: Pattern) -> FFNWeights:
    """Neuron-major views of the projections that `pattern` names in `holder`."""

    def rows(name: str) -> tuple[Tensor, Tensor | None]:
        module: Any = holder.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        return weight, module.bias

    up, up_bias = rows(pattern.up)
    down, down_bias = rows(pattern.down)
    gate = gate_bias = None
    if pattern.fused:
        gate, up = up.chunk(2, dim=0)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.chunk(2)
    elif pattern.gate:
        gate, gate_bias = rows(pattern.gate)
    return FFNWeights(up, down.t(), gate, up_bias, gate_bias, down_bias)


def _below(holder: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    found: nn.Module | None = holder
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def match(holder: nn.Module, in_layer: bool = False) -> Pattern | None:
    """The first row of `PATTERNS` whose projections are all children of `holder` and fit each other, or None."""
    for pattern in PATTERNS:
        names = [name for name, _ in pattern.inputs] + [pattern.down]
        if pattern.in_layer != in_layer or not all(isinstance(_below(holder, n), nn.Linear | Conv1D) for n in names):
            continue
        weights = projections(holder, pattern)
        if all(part.shape == weights.down.shape for part in weights.parts):
            return pattern
    return None
