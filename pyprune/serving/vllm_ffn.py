"""FFNs of vLLM's own model classes by our operator, from a record.

On a CPU vLLM packs the weights of its linear layers for the library that multiplies by them, so neither they nor a
record can be a view of the other: an FFN has its record, or vLLM's layers. Only int8 rows, which are asked for since
they round, may stand beside vLLM's layers, for some numbers of tokens. Which it is `vllm_contest` finds out.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Container
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..base.record import Record
from ..ffn import dispatch, operators
from ..ffn.backends import Problem
from ..ffn.mlp import pack
from ..model.patterns import FFNWeights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RecordFFN(nn.Module):
    """An FFN of vLLM that runs from a record: always, or for some numbers of tokens.

    Args:
        record: the FFN.
        dtype: of x.
        channels: `[D]` that results are multiplied by, see `quantisation.channel_scales`, or None.
        own: vLLM's FFN, which runs for every other number of tokens; None where there is none.
        served: of `own`, the numbers of tokens that the record serves.
    """

    rows: Tensor
    channels: Tensor | None
    _made = itertools.count()

    def __init__(
        self,
        record: Record,
        dtype: torch.dtype,
        channels: Tensor | None = None,
        own: nn.Module | None = None,
        served: Container[int] = (),
    ) -> None:
        super().__init__()
        self.gated, self.activation, self.served, self.own = record.gated, record.activation, served, own
        self.hidden_size = record.hidden_size
        for name in ("rows", "scales", "neuron_bias", "down_bias"):
            self.register_buffer(name, getattr(record, name), persistent=False)
        self.register_buffer("channels", channels, persistent=False)
        layer = (record.hidden_size, False, "cpu", record.neurons, record.gated, record.activation)
        self.native_tokens = dispatch.native_tokens(dtype, record.rows.dtype, *layer)
        self.key = str(next(self._made))
        if own is not None:
            _BESIDE[self.key] = self

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, D]` -> `[tokens, D]`."""
        out: Tensor = self.by_record(x, "auto") if self.own is None else torch.ops.pyprune.record_or_own(x, self.key)
        return out

    def by_record(self, x: Tensor, backend: str) -> Tensor:
        """By our operator alone."""
        tensors = (self.rows, None, self.scales, self.neuron_bias, self.down_bias)
        out: Tensor = operators.FFN(x, *tensors, self.gated, self.activation, backend, self.native_tokens, False)
        return out if self.channels is None else out.mul_(self.channels)


# vLLM traces a model once for all numbers of tokens, so which of the two runs is decided inside an operator.
_BESIDE: WeakValueDictionary[str, RecordFFN] = WeakValueDictionary()
# vLLM's operators for what lies between its layers, by the activation in a record.
_BETWEEN = {"silu": "silu_and_mul", "gelu": "gelu_and_mul", "gelu_tanh": "gelu_tanh_and_mul"}
# These take whole vectors only, and refuse other widths.
_VECTOR = 32


def _by_own(own: Any, x: Tensor, activation: str) -> Tensor:
    """vLLM's FFN by its multiplications and its operator between them.

    Inside an operator vLLM's compiler sees nothing: its modules would go through Python and, for the activation,
    through torch.compile's guards at every call, which on a small FFN takes longer than the FFN. `_check_plain` has
    made sure that it computes no more than this.
    """
    into, out = own.gate_up_proj, own.down_proj
    both: Tensor = into.quant_method.apply(into, x, into.bias)
    between = getattr(torch.ops._C, _BETWEEN[activation], None)
    if between is None or both.shape[1] // 2 % _VECTOR:
        hidden = own.act_fn.forward_native(both)
    else:
        hidden = both.new_empty(both.shape[0], both.shape[1] // 2)
        between(hidden, both)
    found: Tensor = out.quant_method.apply(out, hidden, out.bias)
    return found


def _record_or_own(x: Tensor, key: str) -> Tensor:
    module = _BESIDE[key]
    if x.numel() // x.shape[-1] in module.served:
        return module.by_record(x, "cpu")
    return _by_own(module.own, x.reshape(-1, x.shape[-1]), module.activation).reshape(x.shape)


_LIBRARY = torch.library.Library("pyprune", "FRAGMENT")
_LIBRARY.define("record_or_own(Tensor x, str key) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("record_or_own", _record_or_own, "CompositeExplicitAutograd")
torch.library.register_fake("pyprune::record_or_own", lambda x, _: torch.empty_like(x), lib=_LIBRARY)


@dataclass
class Site:
    """An FFN of vLLM's that a record can compute.

    Attributes:
        name: in the model.
        module: with `gate_up_proj`, `down_proj` and `act_fn`.
        activation: its name in a record.
    """

    name: str
    module: Any
    activation: str

    @property
    def weight(self) -> Tensor:
        """`[D, F]`, until vLLM packs it."""
        weight: Tensor = self.module.down_proj.weight
        return weight

    def problem(self, weights: torch.dtype) -> Problem:
        """One token for a record of such weights."""
        d, f = self.weight.shape
        return Problem("cpu", self.weight.dtype, 1, d, f, f, True, False, self.activation, weights)

    def record(self) -> Record:
        """A copy of its weights, which are still vLLM's own."""
        (gate, up), bias = self.module.gate_up_proj.weight.chunk(2), self.module.gate_up_proj.bias
        gate_bias, up_bias = (None, None) if bias is None else bias.detach().chunk(2)
        down_bias = self.module.down_proj.bias
        rows, neuron_bias = pack(FFNWeights(up, self.weight.t(), gate, up_bias, gate_bias))
        down_bias = None if down_bias is None else down_bias.detach().clone()
        return Record(rows, True, self.activation, None, neuron_bias, down_bias)

    @property
    def layers(self) -> tuple[Any, Any]:
        """Its linear layers."""
        return self.module.gate_up_proj, self.module.down_proj

    def finish(self) -> None:
        """Have vLLM pack the weights now; it leaves alone what is packed."""
        for layer in self.layers:
            layer.quant_method.process_weights_after_loading(layer)

    def free(self) -> None:
        """Drop the weights at once: their loaders hold the layers until the next collection of garbage."""
        for layer in self.layers:
            layer.weight.data = layer.weight.data.new_empty(0)


def _activation(module: nn.Module) -> str | None:
    if type(module).__name__ == "SiluAndMul":
        return "silu"
    if type(module).__name__ == "GeluAndMul":
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(str(getattr(module, "approximate", "")))
    return None


def find(model: nn.Module) -> list[Site]:
    """FFNs in vLLM's own classes whose weights are whole, unquantised and on the CPU."""
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    found = []
    for name, module in model.named_modules():
        children: dict[str, Any] = dict(module.named_children())
        if set(children) != {"gate_up_proj", "down_proj", "act_fn"}:
            continue
        into, out, activation = children["gate_up_proj"], children["down_proj"], _activation(children["act_fn"])
        kinds = isinstance(into, linear.MergedColumnParallelLinear) and isinstance(out, linear.RowParallelLinear)
        if not kinds or activation is None or len(into.output_sizes) != 2 or len(set(into.output_sizes)) != 1:
            continue
        plain = all(
            type(layer.quant_method) is linear.UnquantizedLinearMethod
            and layer.tp_size == 1
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype in _DTYPES
            for layer in (into, out)
        )
        if plain:
            found.append(Site(name, module, activation))
    return found
