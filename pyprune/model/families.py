"""Where a model's FFNs are: detection by structure (see `patterns`), never by the name of a model.

What matches a pattern is then tried out (see `probe`): it must compute a plain or gated FFN with one of the activations
of `reference.ACTIVATIONS`; so a shape that only looks familiar (an extra norm, a multiplier, a hidden residual) is
refused instead of silently changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..base import reference
from ..base.errors import UnsupportedModelError
from .patterns import PATTERNS, FFNWeights, Pattern, match, projections
from .probe import detect_activation
from .weights import check_plain, check_there, leave_inference

WIDTH_KEYS = ("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")

# Of families without any of them.
OWN_WIDTH_KEY = "intermediate_size"

# Config keys that make a family's projections carry a bias where the dense model has none.
BIAS_KEYS = ("mlp_bias",)

# Config keys by which a family derives the FFN width, and the value that makes it take the width as it stands.
WIDTH_AS_IT_STANDS: dict[str, Any] = {"block_auto_adjust_ff_dim": False}


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
    if count is None:
        raise UnsupportedModelError(_without_count(model))
    found = ", ".join(f"{n} ({len(m)})" for n, m in (outer or lists)[:5]) or "no nn.ModuleList"
    wanted = f"{'one' if outer else 'a'} list of {count} decoder layers (config.num_hidden_layers)"
    raise UnsupportedModelError(f"{type(model).__name__} does not have {wanted}; found {found}")


def _without_count(model: nn.Module) -> str:
    """Why a model has no `config.num_hidden_layers`, and what to pass instead, as a sentence."""
    name, config = type(model).__name__, getattr(model, "config", None)
    inner = getattr(model, "module", None)
    if config is None and isinstance(getattr(inner, "config", None), PreTrainedConfig):
        return f"{name} wraps a {type(inner).__name__}: pass what it wraps, model.module"
    if not isinstance(config, PreTrainedConfig):
        return f"{name} is no model of Transformers: it has no config that says how many decoder layers there are"
    towers = [key for key in config.sub_configs if key != "text_config"]
    if "text_config" in config.sub_configs and towers:
        return f"{name} is not a language model alone ({', '.join(towers)}): its text tower is not supported yet"
    return f"{name} has no number of decoder layers in its config (num_hidden_layers of {type(config).__name__})"


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


@torch.inference_mode(False)
@torch.no_grad()
def find_ffns(model: nn.Module) -> list[FFN]:
    """Find the FFN of every decoder layer.

    Tensors of the model that were made in inference mode become ordinary ones, of the same values.

    Raises:
        UnsupportedModelError: no decoder layers, FFNs elsewhere too, weights that are not there or no ordinary floats
            (see `weights`), a layer without a known FFN (a mixture of experts, an unknown shape), or one whose output
            is not `down(act(up(x)))` or `down(act(gate(x)) * up(x))`.
    """
    list_name, layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        if any(hasattr(m, "record") for m in layer.modules()):
            raise UnsupportedModelError(
                f"{list_name}.{i} is accelerated already; prune the loaded checkpoint first, then accelerate it"
            )
    check_there(model)
    check_plain(model, layers, list_name)
    _check_alone(model, list_name)
    leave_inference(model)
    ffns = []
    for i, layer in enumerate(layers):
        prefix = f"{list_name}.{i}"
        candidates = [("", layer, True)] + [(f".{n}", m, False) for n, m in layer.named_modules() if n]
        found = [
            (name, module, pattern) for name, module, flag in candidates if (pattern := match(module, in_layer=flag))
        ]
        if len(found) != 1 or _describe(layer).startswith("a mixture"):
            _check_adapted(model, layer, prefix)
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


def _check_alone(model: nn.Module, list_name: str) -> None:
    """Raise `UnsupportedModelError` when layers with FFNs stand in another list too, as beside a decoder an encoder."""
    for name, module in model.named_modules():
        inside = f"{name}.".startswith(f"{list_name}.") or f"{list_name}.".startswith(f"{name}.")
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        for inner, holder in module.named_modules():
            if match(holder) or (inner.isdigit() and match(holder, in_layer=True)):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has FFNs in {name} beside those in {list_name}; pyprune prunes and "
                    "accelerates models with one list of decoder layers, and would leave these as they are"
                )


def _check_adapted(model: nn.Module, layer: nn.Module, prefix: str) -> None:
    """Raise `UnsupportedModelError` when projections of an FFN in `layer` are wrapped by adapters."""
    known = {name for pattern in PATTERNS for name in (*(n for n, _ in pattern.inputs), pattern.down)}
    for name, module in layer.named_modules():
        if hasattr(module, "base_layer") and name.rpartition(".")[2] in known:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {prefix}.{name} carries adapters ({type(module).__module__}): merge them "
                "first (merge_and_unload), or adapt the attention only"
            )


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
    """The config key that holds the FFN width of this family, or that pyprune gives it (see `has_width`)."""
    keys = config.to_dict()
    return next((key for key in WIDTH_KEYS if key in keys), OWN_WIDTH_KEY)


def has_width(config: Any) -> bool:
    """Whether the family's config has an FFN width at all.

    Where it is a fixed multiple of the hidden size (GPT-1, BLOOM), widths go into `per_layer_config` for every layer,
    also where they are all the same.
    """
    keys = config.to_dict()
    return any(key in keys for key in WIDTH_KEYS)


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
