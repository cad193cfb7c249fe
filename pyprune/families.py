"""Which FFN a model has, and how its family spells it: one table, and detection by structure.

A row names the projections; nothing names a model. What is found is then tried: the FFN module is run on a few
random tokens, over small random weights, and must agree with one of the activations of `reference.ACTIVATIONS`; so a
shape that only looks familiar (an extra norm, a multiplier, a hidden residual) is refused instead of silently changed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import reference
from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Pattern:
    """How one family of models spells its FFN.

    Attributes:
        name: for messages and tables.
        up, down, gate: attribute names of the projections; `gate` is None for a plain FFN.
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
    Pattern("fc1/fc2 in the layer", up="fc1", down="fc2", in_layer=True),
)

WIDTH_KEYS = ("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")

# Config keys that make a family's projections carry a bias where the dense model has none.
BIAS_KEYS = ("mlp_bias",)

# Config keys that a family derives the FFN width with, and the value that makes it take the width as it stands.
WIDTH_AS_IT_STANDS: dict[str, dict[str, Any]] = {"lfm2": {"block_auto_adjust_ff_dim": False}}


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


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN found in a model.

    Attributes:
        layer: number of the decoder layer.
        name: dotted path, in the model, of the module that holds the projections.
        holder: that module.
        pattern: the row of `PATTERNS` it matched.
        activation: a key of `reference.ACTIVATIONS`.
    """

    layer: int
    name: str
    holder: nn.Module
    pattern: Pattern
    activation: str

    @property
    def down(self) -> nn.Module:
        return self.holder.get_submodule(self.pattern.down)

    @property
    def gated(self) -> bool:
        return self.pattern.gated

    @property
    def hidden_size(self) -> int:
        return self.weights().down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.weights().down.shape[0]

    @property
    def dropout(self) -> float:
        """Dropout probability that the FFN module applies to its output while training."""
        if self.pattern.in_layer:
            return 0.0  # the decoder layer applies its own
        found = [m.p for m in self.holder.children() if isinstance(m, nn.Dropout)]
        return float(found[0] if found else getattr(self.holder, "residual_dropout", 0.0))

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the FFN's projections."""
        names = [name for name, _ in self.pattern.inputs] + [self.pattern.down]
        return [p for name in names for p in self.holder.get_submodule(name).parameters()]

    def weights(self) -> FFNWeights:
        """Views of the projections, neuron-major; they share memory with the model."""
        return projections(self.holder, self.pattern)


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


def match(holder: nn.Module, in_layer: bool = False) -> Pattern | None:
    """The first row of `PATTERNS` whose projections are all children of `holder` and fit each other, or None."""
    children = dict(holder.named_children())
    for pattern in PATTERNS:
        names = [name for name, _ in pattern.inputs] + [pattern.down]
        if pattern.in_layer != in_layer or not all(isinstance(children.get(n), nn.Linear | Conv1D) for n in names):
            continue
        weights = projections(holder, pattern)
        if all(part.shape == weights.down.shape for part in weights.parts):
            return pattern
    return None


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted path and the list of the model's decoder layers.

    Raises:
        UnsupportedModelError: not exactly one outermost list as long as `config.num_hidden_layers` says.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(n, m) for n, m in lists if count and len(m) == count]
    outer = [(n, m) for n, m in fitting if not any(n.startswith(f"{o}.") for o, _ in fitting)]
    if len(outer) == 1:
        return outer[0]
    found = ", ".join(f"{n} ({len(m)})" for n, m in (outer or lists)[:5]) or "no nn.ModuleList"
    wanted = f"{'one' if outer else 'a'} list of {count} decoder layers (config.num_hidden_layers)"
    raise UnsupportedModelError(f"{type(model).__name__} does not have {wanted}; found {found}")


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


def _small_projection(projection: Any, inputs: int, outputs: int, generator: torch.Generator) -> Any:
    """A copy of a Linear or Conv1D, or of a subclass with its own forward, with small random float64 weights."""
    small = copy.copy(projection)
    small._parameters = {}
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    small.weight = nn.Parameter(weight.t().contiguous() if isinstance(projection, Conv1D) else weight)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64) / 4
    small.bias = None if projection.bias is None else nn.Parameter(bias)
    small.nx, small.nf = small.in_features, small.out_features = inputs, outputs
    return small


def _miniature(holder: nn.Module, pattern: Pattern) -> nn.Module:
    """A shallow copy of an FFN module with small random projections; everything else in it is the module's own."""
    hidden, neurons = 8, 24
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(holder)
    small._modules = dict(holder._modules)
    for name, blocks in pattern.inputs:
        small._modules[name] = _small_projection(holder.get_submodule(name), hidden, blocks * neurons, generator)
    small._modules[pattern.down] = _small_projection(holder.get_submodule(pattern.down), neurons, hidden, generator)
    return small


def _same(got: Any, want: Tensor) -> bool:
    """Whether every row agrees to 1e-6 of its norm: float64 is far closer, two different activations are not."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    error = torch.linalg.vector_norm(got - want, dim=-1)
    return bool((error <= 1e-6 * torch.linalg.vector_norm(want, dim=-1)).all())


def detect_activation(holder: nn.Module, pattern: Pattern) -> str | None:
    """Name the activation by behaviour: run the module (in_layer: its activation) and compare.

    The module runs in float64 over small random weights instead of its own, so neither its dtype nor its size nor
    dead weights blur the answer. Inputs reach from small values, which tell smooth activations apart, to large ones,
    which tell clipped ones from unclipped.
    """
    if pattern.in_layer:
        act = getattr(holder, "activation_fn", None)
        if act is None:
            return None
        x = torch.linspace(-1, 1, 97, dtype=torch.float64) * torch.tensor([[2.0], [20.0]], dtype=torch.float64)
        got = act(x)
        return next((name for name, fn in reference.ACTIVATIONS.items() if _same(got, fn(x))), None)
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[1] *= 16
    try:
        with evaluating(holder):
            small = _miniature(holder, pattern)
            got = small(x)
    except (TypeError, ValueError, IndexError, RuntimeError, KeyError, AttributeError):
        return None  # it wants more than a hidden state, so it is no FFN that a record can stand for
    weights = projections(small, pattern)
    return next((n for n in reference.ACTIVATIONS if _same(got, _reference_output(weights, x, n))), None)


def _wide_norm(layer: nn.Module, width: int, hidden_size: int) -> str | None:
    """The name of a norm over the neurons of an in-layer FFN, which no module call would reveal, or None."""
    if width == hidden_size:
        return None
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,):
            return name
    return None


def _describe(layer: nn.Module) -> str:
    """What a layer without a known FFN holds, for the refusal."""
    for name, module in layer.named_modules():
        if name and (hasattr(module, "experts") or "experts" in type(module).__name__.lower()):
            return f"a mixture of experts, {name} ({type(module).__name__})"
    kinds = [
        f"{name} ({type(module).__name__}: {', '.join(n for n, _ in module.named_children()) or 'no children'})"
        for name, module in layer.named_children()
    ]
    return "; ".join(kinds)


@torch.no_grad()
def find_ffns(model: nn.Module) -> list[FFN]:
    """Find the FFN of every decoder layer.

    Raises:
        UnsupportedModelError: no decoder layers, a layer without a known FFN (a mixture of experts, an unknown
            shape), or one whose output is not `down(act(up(x)))` or `down(act(gate(x)) * up(x))`.
    """
    list_name, layers = decoder_layers(model)
    ffns = []
    for i, layer in enumerate(layers):
        prefix = f"{list_name}.{i}"
        if any(hasattr(m, "record") for m in layer.modules()):
            raise UnsupportedModelError(
                f"{prefix} is accelerated already; prune the loaded checkpoint first, then accelerate it"
            )
        candidates = [("", layer, True)] + [(f".{n}", m, False) for n, m in layer.named_modules() if n]
        found = [
            (name, module, pattern) for name, module, flag in candidates if (pattern := match(module, in_layer=flag))
        ]
        if len(found) != 1 or _describe(layer).startswith("a mixture"):
            what = "more than one FFN" if len(found) > 1 else "no FFN that pyprune knows"
            raise UnsupportedModelError(f"{type(model).__name__}: {prefix} has {what}; found {_describe(layer)}")
        name, module, pattern = found[0]
        activation = detect_activation(module, pattern)
        if activation is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {prefix}{name} ({type(module).__name__}, {pattern.name}) does not compute "
                f"a {'gated' if pattern.gated else 'plain'} FFN with one of {', '.join(reference.ACTIVATIONS)}"
            )
        ffn = FFN(i, prefix + name, module, pattern, activation)
        if pattern.in_layer and (norm := _wide_norm(layer, ffn.intermediate_size, ffn.hidden_size)):
            raise UnsupportedModelError(f"{type(model).__name__}: {prefix} has a norm over its neurons, {norm}")
        ffns.append(ffn)
    _check_shared(model, ffns)
    return ffns


def _check_shared(model: nn.Module, ffns: list[FFN]) -> None:
    owner: dict[int, str] = {}
    for ffn in ffns:
        for parameter in ffn.parameters():
            other = owner.setdefault(id(parameter), ffn.name)
            if other != ffn.name:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {other} and {ffn.name} share weights, so they cannot be pruned apart"
                )


def width_key(config: Any) -> str:
    """The config key that holds the FFN width of this family.

    Raises:
        UnsupportedModelError: the family has none (its width is a fixed multiple of the hidden size).
    """
    keys = config.to_dict()
    for key in WIDTH_KEYS:
        if key in keys:
            return key
    raise UnsupportedModelError(
        f"{type(config).__name__} has no FFN width in its config (looked for {', '.join(WIDTH_KEYS)}), "
        "so a narrower FFN could not be loaded again"
    )


def bias_key(config: Any) -> str | None:
    """The config key that gives this family's FFN projections a bias, or None where the format has none."""
    keys = config.to_dict()
    return next((key for key in BIAS_KEYS if key in keys), None)


def ffn_block(model: nn.Module, ffns: list[FFN]) -> dict[str, Any]:
    """The description of the FFNs that a checkpoint's config carries (see `heterogeneous`)."""
    pattern = ffns[0].pattern
    list_name, layers = decoder_layers(model)
    base_model: Any = model.base_model
    base = {id(m): n for n, m in base_model.named_modules()}
    inner = ffns[0].name.removeprefix(f"{list_name}.0").removeprefix(".")
    dot = f"{inner}." if inner else ""
    return {
        "layers": base[id(layers)],
        "width_key": width_key(model.config),
        "in": [[dot + name, blocks] for name, blocks in pattern.inputs],
        "out": dot + pattern.down,
    }


def fingerprint(model: nn.Module, ffns: list[FFN]) -> str:
    """A hex SHA-256 that names a dense model: its type, its FFN shapes, and a sample of every FFN's weights.

    Weights are rounded to bfloat16 first, so a checkpoint has one fingerprint whether it is loaded in float32 or
    in bfloat16. The sample is at least 4096 values (all, of fewer) of each part of each layer, evenly spread.
    """
    digest = hashlib.sha256()
    digest.update(str(getattr(model.config, "model_type", "")).encode())
    for ffn in ffns:
        weights = ffn.weights()
        digest.update(repr((ffn.layer, ffn.gated, tuple(weights.down.shape))).encode())
        for part in weights.parts:
            step = max(1, part.numel() // 4096)
            rows, columns = _spread(part.shape, step)
            sample = part.detach()[rows.to(part.device), columns.to(part.device)]
            digest.update(sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _spread(shape: torch.Size, step: int) -> tuple[Tensor, Tensor]:
    flat = torch.arange(0, shape[0] * shape[1], step)
    return flat // shape[1], flat % shape[1]
