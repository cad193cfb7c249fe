"""A pruned model as a GGUF file: its FFNs, and everything else from the file of the dense model, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import InputError, UnsupportedModelError, check, check_choice
from ..base.files import check_name, new_file
from ..model import provenance
from ..model.families import FFN, find_ffns
from . import gguf_check
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
class Written:
    """What an export wrote.

    Attributes:
        path: the file.
        arch: its architecture in llama.cpp.
        widths: neurons of each layer in it, zero ones included.
        neurons: of each layer, in the model.
        type: of the FFNs' matrices.
        kept: tensors that were taken over from the base.
        compared: of those, how many were found in the model.
        bytes: its size.
        check: how it was checked (see `gguf_check`).
    """

    path: str
    arch: str
    widths: list[int]
    neurons: list[int]
    type: str
    kept: int
    compared: int
    bytes: int
    check: dict[str, Any]


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


def check_out_file(out: str | Path, overwrite: bool) -> Path:
    """The file `out`, if it may be written.

    Raises:
        InputError: it exists and may not be replaced, or is a folder.
    """
    check_name(out, "out")
    path = Path(out)
    if path.is_dir():
        raise InputError(f"out must be a file; {path} is a folder")
    if path.exists() and not overwrite:
        raise InputError(f"out must not exist yet; {path} does (pass overwrite to replace it)")
    return path


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


def to_gguf(
    model: nn.Module,
    base: str | Path,
    out: str | Path,
    kind: str = "bf16",
    widths: str = "as-is",
    overwrite: bool = False,
    tokens: Tensor | None = None,
) -> Written:
    """Write a pruned model as a GGUF file for llama.cpp, and check it.

    Args:
        model: a pruned causal LM of Transformers.
        base: the GGUF file of the dense model; tokenizer, metadata and all tensors but the FFNs' come from it.
        out: the file; made whole beside its place, then renamed.
        kind: type of the FFNs' matrices, one of `TYPES`; biases are float32.
        widths: `as-is`, or `padded`: zero neurons where the architecture has one width for all layers (to the widest)
            or the type has blocks (to the next one). They change no value.
        overwrite: replace a file.
        tokens: `[N, L]` prompts whose logits are compared, where llama-cpp-python is installed; None compares none.

    Raises:
        InputError: `out` exists; `base` is another model's; a wrong type; or widths that cannot be written as they are.
        CheckpointError: `base` cannot be read, or what was written does not read back as the model.
        UnsupportedModelError: an FFN that pyprune does not know, or one that the base spells otherwise.
        OSError: the disk is full, or not writable; nothing has changed then.
    """
    check_choice(kind, "type", TYPES)
    check_choice(widths, "widths", WIDTHS)
    path = check_out_file(out, overwrite)
    dense = Base(base)
    check(not path.exists() or not path.samefile(dense.path), "out", "be another file than base", str(out))
    ffns = find_ffns(model)
    neurons = [ffn.intermediate_size for ffn in ffns]
    arch, planned = plan_widths(dense.arch, neurons, kind, widths)
    compared = dense.check_belongs(model)
    entries = plan(dense, ffns, planned, kind, arch)
    with new_file(path) as temporary:
        _write(temporary, dense, entries, arch, planned, kind, provenance.read(model.config))
        facts = gguf_check.read_back(temporary, dense, ffns, arch, planned)
        if tokens is not None:
            facts.update(gguf_check.logits(temporary, model, tokens, kind))
    kept = sum(not _of_ffn(name) for name in entries)
    size = path.stat().st_size
    return Written(str(path), arch, planned, neurons, kind, kept, compared, size, facts)


def _of_ffn(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 4 and parts[2] in ("ffn_gate", "ffn_up", "ffn_down") and parts[3] in ("weight", "bias")


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
        found: np.ndarray = package().quants.quantize(values.to(torch.float32).contiguous().numpy(), kind)
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
    missing = sorted(name for name in made if name not in theirs and name.endswith("weight"))
    extra = sorted(name for name in theirs if _of_ffn(name) and name not in made)
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
        if not _of_ffn(name) and full != ffn.hidden_size and full in base.tensors[name].shape:
            raise UnsupportedModelError(f"{base.path.name} ({base.arch}) has {name}, as wide as the FFN, beside it")


def _write(
    path: Path, base: Base, entries: dict[str, Entry], arch: str, widths: list[int], kind: str, made: dict[str, Any]
) -> None:
    gguf = package()
    writer = gguf.GGUFWriter(path, arch)
    kinds = gguf.GGUFValueType
    alignment = base.value("general.alignment")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, field in base.reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.alignment"):
            continue
        if field.types[0] == kinds.ARRAY and not field.data:  # its writer takes no empty ones
            continue
        new = f"{arch}{key.removeprefix(base.arch)}" if key.startswith(f"{base.arch}.") else key
        sub = field.types[-1] if field.types[0] == kinds.ARRAY else None
        writer.add_key_value(new, field.contents(), field.types[0], sub_type=sub)
    length = widths if len(set(widths)) > 1 else widths[0]
    array = isinstance(length, list)
    writer.kv_data[0].pop(f"{arch}.feed_forward_length", None)
    writer.kv_data[0].pop("general.file_type", None)
    writer.add_key_value(
        f"{arch}.feed_forward_length",
        length,
        kinds.ARRAY if array else kinds.UINT32,
        sub_type=kinds.UINT32 if array else None,
    )
    writer.add_file_type(TYPES[kind])
    facts = {name: made[name] for name in ("base_fingerprint", "provenance") if name in made}
    if facts:
        writer.add_string("pyprune", json.dumps(facts))
    for name, entry in entries.items():
        block, size = gguf.GGML_QUANT_SIZES[entry.kind]
        count = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), count, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries.values():
        writer.write_tensor_data(np.ascontiguousarray(entry.make()))
    writer.close()
