"""What a GGUF file of a pruned model holds: its architecture and widths, and every tensor with how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import InputError, UnsupportedModelError, check
from ..model.families import FFN
from .gguf_base import Base, heads_apart, package
from .padding import padded

# Types of the FFNs' matrices, and how llama.cpp numbers a file that is mostly of it.
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
WIDTHS = ("as-is", "padded")
# Architectures whose graph in llama.cpp has a width for each layer (`n_ff(i)` in src/models).
OWN_WIDTHS = ("deci", "gemma4", "openelm")
# Those that are `deci`'s graph but for its widths; of the second, heads turn other pairs (`heads_apart`).
AS_DECI = {"llama": False, "qwen2": True}
_BIASES_OPTIONAL = ("llama", "deci")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its values are made when they are written.

    Attributes:
        kind: its type in GGML.
        shape: `[rows, columns]` or `[values]`.
        make: its bytes.
    """

    kind: Any
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def plan_widths(arch: str, neurons: list[int], kind: str, widths: str) -> tuple[str, list[int]]:
    """How many neurons each layer has in the file, and as which architecture it is written.

    Args:
        arch: of the base.
        neurons: of each layer of the model.
        kind: one of `TYPES`.
        widths: `as-is` or `padded`: with zero neurons, as far as the architecture and the type need them.

    Raises:
        InputError: they cannot be as they are, and `widths` is `as-is`.
    """
    gguf = package()
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0]
    split = [-(-width // block) * block for width in neurons]
    if widths == "as-is" and split != neurons:
        layer = next(i for i, width in enumerate(neurons) if width % block)
        raise InputError(
            f"type {kind} must be able to split every layer's neurons into blocks of {block}; layer {layer} has "
            f"{neurons[layer]}: prune with --multiple {block}, export with --widths padded, or as bf16"
        )
    if len(set(split)) == 1:
        return arch, split
    if arch in OWN_WIDTHS:
        return arch, split
    if arch in AS_DECI:
        return "deci", split
    if widths == "as-is":
        raise InputError(
            f"widths must be the same in all layers for {arch!r}, of which llama.cpp reads one; the model has "
            f"{min(neurons)} to {max(neurons)}: export with --widths padded, which fills up with zero neurons"
        )
    return arch, [max(split)] * len(split)


def of_ffn(name: str) -> bool:
    return _beside_ffn(name) and name.split(".", 3)[3] in ("weight", "bias")


def _beside_ffn(name: str) -> bool:
    """Whether a tensor is a projection's of an FFN: its weight, its bias or, say, a scale of the weight."""
    parts = name.split(".", 3)
    return len(parts) == 4 and parts[2] in ("ffn_gate", "ffn_up", "ffn_down")


def ffn_tensors(ffn: FFN, width: int, fused: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one FFN as llama.cpp names and lays them out.

    Args:
        ffn: the FFN.
        width: neurons, zero ones after its own included.
        fused: gate and up stand in one tensor, `ffn_up`, gate first.
    """
    weights = padded(ffn, width)
    prefix = f"blk.{ffn.layer}.ffn_"
    inputs = {"up": (weights.up, weights.up_bias)}
    if weights.gate is not None and fused:
        bias = None
        if weights.gate_bias is not None and weights.up_bias is not None:
            bias = torch.cat([weights.gate_bias, weights.up_bias])
        inputs["up"] = torch.cat([weights.gate, weights.up]), bias
    elif weights.gate is not None:
        inputs["gate"] = weights.gate, weights.gate_bias
    for part, (rows, bias) in (*inputs.items(), ("down", (weights.down.t(), weights.down_bias))):
        yield f"{prefix}{part}.weight", rows
        if bias is not None:
            yield f"{prefix}{part}.bias", bias


def is_fused(base: Base, ffn: FFN) -> bool:
    """Whether the base keeps gate and up of this FFN in one tensor."""
    return ffn.gated and f"blk.{ffn.layer}.ffn_gate.weight" not in base.tensors


def plan(base: Base, ffns: list[FFN], widths: list[int], kind: str, arch: str) -> dict[str, Entry]:
    """Every tensor of the file by name, in the order of the base.

    Raises:
        InputError: the base's FFNs are narrower than the model's.
        UnsupportedModelError: the base's FFNs are spelt otherwise.
    """
    gguf = package()
    kinds = gguf.GGMLQuantizationType
    block, hidden = gguf.GGML_QUANT_SIZES[kinds[kind.upper()]][0], ffns[0].hidden_size
    check(hidden % block == 0, "type", f"split the hidden size {hidden} into whole blocks, of {block} in {kind}", kind)
    new: dict[str, Entry] = {}
    for ffn, width in zip(ffns, widths, strict=True):
        made = dict(ffn_tensors(ffn, width, is_fused(base, ffn)))
        _check_spelling(base, ffn, made, arch)
        for name, values in made.items():
            of = kinds[kind.upper()] if values.ndim == 2 else kinds.F32
            new[name] = Entry(of, tuple(values.shape), _quantised(values, of))
    result: dict[str, Entry] = {}
    turned = arch == "deci" and AS_DECI.get(base.arch, False)
    if turned and (fused := next((name for name in base.tensors if ".attn_qkv." in name), None)):
        raise UnsupportedModelError(
            f"{base.path.name} has queries and keys in one tensor, {fused}, so heads cannot be put in the order that "
            "llama.cpp's deci needs: export with another base, or --to padded and convert that"
        )
    for name, tensor in base.tensors.items():
        if name not in new:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            result[name] = Entry(tensor.tensor_type, shape, _taken(base, name, turned))
        elif name not in result:
            result[name] = new[name]
    return result | {name: entry for name, entry in new.items() if name not in result}


def _quantised(values: Tensor, kind: Any) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        found: np.ndarray = package().quants.quantize(values.to("cpu", torch.float32).contiguous().numpy(), kind)
        return found

    return make


def _taken(base: Base, name: str, turned: bool) -> Callable[[], np.ndarray]:
    """A tensor of the base as it is, or with the rows of each head in the order of llama.cpp's LLaMA."""

    def make() -> np.ndarray:
        data: np.ndarray = base.tensors[name].data
        if turned and (".attn_q." in name or ".attn_k." in name):
            return np.ascontiguousarray(data[heads_apart(data.shape[0], base.heads(name))])
        return data

    return make


def _check_spelling(base: Base, ffn: FFN, made: dict[str, Tensor], arch: str) -> None:
    """Raise unless the base has the FFN's tensors, at no smaller width, and nothing else that is as wide."""
    prefix = f"blk.{ffn.layer}.ffn_"
    theirs = {name for name in base.tensors if name.startswith(prefix)}
    if scales := sorted(name for name in theirs if _beside_ffn(name) and not of_ffn(name)):
        raise UnsupportedModelError(
            f"{base.path.name} has {scales[0]}, which belongs to weights that are replaced: export over a base whose "
            "FFNs stand in ordinary types"
        )
    missing = sorted(name for name in made if name not in theirs and name.endswith("weight"))
    extra = sorted(name for name in theirs if of_ffn(name) and name not in made)
    biases = sorted(name for name in made if name not in theirs and name.endswith("bias"))
    if biases and arch in _BIASES_OPTIONAL:
        biases = []
    if missing or extra or biases:
        raise UnsupportedModelError(
            f"{base.path.name} ({base.arch}) spells the FFN of layer {ffn.layer} otherwise: it "
            + (f"has {', '.join(extra)} too" if extra else f"lacks {', '.join(missing + biases)}")
        )
    full = int(base.tensors[f"{prefix}down.weight"].shape[0])
    own = ffn.intermediate_size
    rows, blocks = int(base.tensors[f"{prefix}up.weight"].shape[1]), 2 if is_fused(base, ffn) else 1
    if rows != full * blocks:
        raise UnsupportedModelError(
            f"{base.path.name} ({base.arch}) spells the FFN of layer {ffn.layer} otherwise: {rows} rows lead into "
            f"{full} neurons, where the checkpoint has {blocks} a neuron"
        )
    check(full >= own, "base", f"have at least the checkpoint's {own} neurons in layer {ffn.layer}", full)
    for name in sorted(theirs):
        if not of_ffn(name) and full != ffn.hidden_size and full in base.tensors[name].shape:
            raise UnsupportedModelError(f"{base.path.name} ({base.arch}) has {name}, as wide as the FFN, beside it")
