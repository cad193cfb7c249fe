"""A pruned model as a GGUF file: its FFNs, and everything else from the file of the dense model, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..base.errors import InputError, check, check_choice
from ..base.files import check_name, new_file
from ..model import provenance
from ..model.families import find_plain
from . import gguf_check
from .gguf_base import Base, package
from .gguf_plan import TYPES, WIDTHS, Entry, of_ffn, plan, plan_widths


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
    ffns = find_plain(model, "the export to GGUF")
    neurons = [ffn.intermediate_size for ffn in ffns]
    arch, planned = plan_widths(dense.arch, neurons, kind, widths)
    compared = dense.check_belongs(model)
    entries = plan(dense, ffns, planned, kind, arch)
    with new_file(path) as temporary:
        _write(temporary, dense, entries, arch, planned, kind, provenance.read(model.config))
        facts = gguf_check.read_back(temporary, dense, ffns, arch, planned)
        if tokens is not None:
            facts.update(gguf_check.logits(temporary, model, tokens, kind))
    kept = sum(not of_ffn(name) for name in entries)
    size = path.stat().st_size
    return Written(str(path), arch, planned, neurons, kind, kept, compared, size, facts)


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
