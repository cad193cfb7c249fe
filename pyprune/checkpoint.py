"""Pruned checkpoints: ordinary Hugging Face folders, written whole or not at all, and verified without trust.

Beside what `save_pretrained` writes there is `pyprune.json` (hashes, widths, provenance) and, only where widths differ
by layer, `modeling_pyprune.py` (a copy of `heterogeneous.py`), which `trust_remote_code=True` uses.
"""

from __future__ import annotations

import inspect
import json
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from . import families, heterogeneous
from .errors import CheckpointError, InputError
from .files import check_out_folder, new_folder, sha256_of

MANIFEST = "pyprune.json"
REMOTE_CODE = "modeling_pyprune.py"
_FORMAT = 1
_MOST_LAYERS = 1_000
_WIDEST = 1 << 24
_LOADED = {".safetensors", ".json", ".py", ".bin", ".pt", ".pth", ".pkl"}  # what a loader might read
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _remote_code(class_name: str) -> str:
    source = inspect.getsource(heterogeneous)
    stock = f"from transformers import {class_name}  # noqa: E402"
    return f"{source}\n\n{stock}\n\n{class_name} = pruned_class({class_name})\n"


def _stock_class_name(model: nn.Module) -> str:
    name = type(model).__name__
    if not hasattr(transformers, name):
        raise InputError(f"model must be of a class that Transformers has; got {name}")
    return name


def _write_manifest(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    config: Any = model.config
    manifest = {
        **facts,
        "format": _FORMAT,
        "model_type": config.model_type,
        "widths": _config_widths(config),
        "base_fingerprint": (getattr(config, "pyprune", None) or {}).get("base_fingerprint"),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _nested(model: nn.Module) -> Any:
    """What `nested` keeps beside the weights of a model whose config says that it does, else None.

    Raises:
        CheckpointError: the model does not have it with it.
    """
    entry = (getattr(model.config, "pyprune", None) or {}).get("nested") or {}
    kept = getattr(model, "pyprune_nested", None)
    if entry.get("file") and kept is None:
        raise CheckpointError(
            f"the model's config names {entry['file']}, which was not loaded with the model; call "
            "pyprune.nested.attach(model, its folder) first; nothing was written"
        )
    return kept if entry.get("file") else None


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a pruned (or accelerated) model as a Hugging Face checkpoint.

    Args:
        model: a causal LM of Transformers.
        path: the folder; made whole beside its place, then renamed.
        tokenizer: saved along if given.
        overwrite: replace an existing folder; the old one stays whole until the new one is.
        facts: JSON values for the manifest.

    Raises:
        InputError: the folder exists, or the model's class is not one of Transformers'.
        CheckpointError: the model's config would not build a model of the shapes to be saved, or names compensated
            rows of nested widths that the model does not have.
        OSError: the disk is full, or not writable; nothing has changed then.
    """
    check_out_folder(path, overwrite)
    config: Any = model.config
    class_name = _stock_class_name(model)
    widths = heterogeneous.layer_widths(config)
    if widths is None:
        config.__dict__.pop("auto_map", None)
    else:
        config.auto_map = {"AutoModelForCausalLM": f"{Path(REMOTE_CODE).stem}.{class_name}"}
    _check_rebuilds(model)
    nested = _nested(model)
    pretrained: Any = model
    with new_folder(path, overwrite) as folder:
        pretrained.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if widths is not None:
            (folder / REMOTE_CODE).write_text(_remote_code(class_name), encoding="utf-8")
        if nested is not None:
            nested.save(folder)
        _write_manifest(folder, model, facts or {})
    return Path(path)


def _meta_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model built from `config`, without memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_rebuilds(model: nn.Module) -> None:
    config: Any = model.config
    wanted = _meta_shapes(type(config).from_dict(config.to_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{name} has shape {shapes.get(name)} in the model, but its config builds {wanted.get(name)}; "
                "nothing was written"
            )


def _bounded(raw: dict[str, Any]) -> dict[str, Any]:
    """Refuse a config that would build an enormous model before any config class of Transformers reads it."""
    for key in _DEPTH_KEYS:
        if isinstance(raw.get(key), int) and not 0 <= raw[key] <= _MOST_LAYERS:
            raise CheckpointError(f"config {key} must lie in [1, {_MOST_LAYERS}]; got {raw[key]!r}")
    return raw


def _config_widths(config: Any) -> list[int]:
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointError(f"config num_hidden_layers must lie in [1, {_MOST_LAYERS}]; got {layers!r}")
    key = families.width_key(config)
    widths = [getattr(c, key) for c in config.per_layer_config] if config.is_heterogeneous else [getattr(config, key)]
    for i, width in enumerate(widths):
        if width is None:  # GPT-2's way of saying 4 * hidden_size
            continue
        if not isinstance(width, int) or not 1 <= width <= _WIDEST:
            raise CheckpointError(f"config {key} of layer {i} must lie in [1, {_WIDEST}]; got {width!r}")
    return widths if len(widths) == layers else widths * layers


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    try:
        raw = _bounded(json.loads(path.read_text(encoding="utf-8")))
        values = {k: v for k, v in raw.items() if k != "model_type"}
        config: Any = AutoConfig.for_model(str(raw.get("model_type")), **values)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a config class of Transformers makes of hostile values
        raise CheckpointError(f"{path} is not a usable config: {type(error).__name__}: {error}") from error
    return config


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of a folder's safetensors files; no tensor is read.

    Raises:
        CheckpointError: no such file, a damaged header, or a file shorter than its header says.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > size - 8:
                    raise CheckpointError(f"{file.name} is truncated: its header says {length} bytes, it has {size}")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file.name} has a damaged header: {error}") from error
        if size != 8 + length + end:
            raise CheckpointError(f"{file.name} must have {8 + length + end} bytes; it has {size}")
    return shapes


def check_fits(folder: str | Path) -> list[int]:
    """Compare a checkpoint's config with the shapes in its safetensors headers; return the FFN widths.

    Nothing of the size of the model is allocated.

    Raises:
        CheckpointError: a hostile or unusable config, damaged tensors, or widths that do not fit them.
    """
    folder = Path(folder)
    config = _read_config(folder)
    widths = _config_widths(config)
    shapes = tensor_shapes(folder)
    try:
        wanted = _meta_shapes(config)
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except Exception as error:  # a config that no model class of Transformers accepts
        raise CheckpointError(f"{folder}/config.json builds no model: {type(error).__name__}: {error}") from error
    if not set(wanted) & set(shapes):  # a checkpoint of the bare decoder, as GPT-2's own
        shapes = {f"{model_class.base_model_prefix}.{name}": shape for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name in wanted and wanted[name] != shape:
            raise CheckpointError(f"{name} has shape {shape} in the file, but config.json says {wanted[name]}")
    if not set(wanted) & set(shapes):
        raise CheckpointError(f"{folder}: no tensor of the file belongs to the model that config.json builds")
    return widths


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The folder's `pyprune.json`.

    Raises:
        InputError: no such folder.
        CheckpointError: not a checkpoint that pyprune wrote, or a damaged manifest.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"checkpoint must be an existing folder; got {str(folder)!r}")
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} was not written by pyprune (it has no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads {_FORMAT}")
        files = {str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()}
        list(manifest["widths"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError(f"{path} names files outside its folder")
    result: dict[str, Any] = manifest
    return result


def verify(folder: str | Path) -> dict[str, Any]:
    """Check a checkpoint that pyprune wrote: every file's size and hash, nothing added, and widths against tensors.

    Returns:
        The manifest.

    Raises:
        InputError: no such folder.
        CheckpointError: the first thing that is wrong.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing from {folder}")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{name} must have {entry['bytes']} bytes; it has {file.stat().st_size}")
        if sha256_of(file) != entry["sha256"]:
            raise CheckpointError(f"{name} was altered: its SHA-256 is not the one in {MANIFEST}")
    for file in sorted(folder.iterdir()):
        if file.suffix in _LOADED and file.name not in {*manifest["files"], MANIFEST}:
            raise CheckpointError(f"{file.name} lies in {folder}, but {MANIFEST} does not list it")
    widths = check_fits(folder)
    if widths != manifest["widths"]:
        raise CheckpointError(f"{MANIFEST} says widths {manifest['widths']}, config.json says {widths}")
    return manifest
