"""Pruned checkpoints: ordinary Hugging Face folders, written whole or not at all, and verified without trust.

Beside what `save_pretrained` writes there is `pyprune.json` (hashes, widths, provenance) and, only where widths differ
by layer, `modeling_pyprune.py` (see `remote_code`), which `trust_remote_code=True` uses.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..base.errors import CheckpointError, UnsupportedModelError, check, is_count, one_line
from ..base.files import check_out_folder, new_folder, sha256_of
from . import families, heterogeneous, provenance
from .manifest import FORMAT, MANIFEST, is_tokenizer, keep_tokenizer, read_manifest, strangers
from .shards import read_header, read_index
from .towers import config_at, text_config
from .weights import is_sharded
from .widths import module_widths, set_widths, stock_class

# As for Transformers' `save_pretrained`.
MAX_SHARD_SIZE = "50GB"
_MOST_LAYERS = 1_000
_WIDEST = 1 << 24
_LOADED = {".safetensors", ".json", ".py", ".bin", ".pt", ".pth", ".pkl"}  # what a loader might read
_DEPTH_KEYS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "depth",
)  # fmt: skip


def _check_stock_class(model: nn.Module) -> None:
    name = type(model).__name__
    check(hasattr(transformers, name), "model", "be of a class that Transformers has", name)


def _write_manifest(folder: Path, model: nn.Module, facts: dict[str, Any], known: dict[str, str]) -> None:
    """Write the manifest; `known` are SHA-256 of files that need not be read for it."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": known.get(file.name) or sha256_of(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    config: Any = model.config
    manifest = {
        **facts,
        "format": FORMAT,
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
            "pyprune.pruning.nested.attach(model, its folder) first; nothing was written"
        )
    return kept if entry.get("file") else None


def check_out(path: str | Path, overwrite: bool, max_shard_size: int | str = MAX_SHARD_SIZE) -> Path:
    """The folder that `save` would write to, links followed; raises its `InputError` for these arguments."""
    size = max_shard_size
    spelt = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.strip(), re.IGNORECASE) if isinstance(size, str) else None
    usable = float(spelt[1]) > 0 if spelt else is_count(size) and size != 0
    check(usable, "max_shard_size", "be a number of bytes, or one with KB, MB, GB or TB such as '5GB'", size)
    return check_out_folder(path, overwrite, strangers)


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    facts: dict[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a pruned (or accelerated) model as a Hugging Face checkpoint.

        >>> model, tokenizer = load("demo")
        >>> save(model, "smol", tokenizer).name
        'smol'

    Args:
        model: a causal LM of Transformers.
        path: the folder; made whole beside its place, then renamed. Through a symbolic link, what it names is written.
        tokenizer: saved along; None keeps what of a tokenizer is in a folder that is replaced.
        overwrite: replace a checkpoint of pyprune's, which stays whole until the new one is.
        facts: JSON values for the manifest.
        max_shard_size: bytes of one file of weights at most, or a string such as "5GB"; what is larger is written as
            several files and an index, as by `save_pretrained`.

    Raises:
        InputError: the folder exists, holds anything but a checkpoint of pyprune's, or cannot be written or replaced;
            `max_shard_size` is no size; the model's class is not one of Transformers', or its weights are cut over
            processes.
        CheckpointError: the model's config would not build a model of the shapes to be saved, or names compensated
            rows of nested widths that the model does not have.
        OSError: the disk is full, or not writable; nothing has changed then.
    """
    target = check_out(path, overwrite, max_shard_size)
    config: Any = model.config
    _check_stock_class(model)
    what = "have whole weights; where they are cut over processes, each calls model.save_pretrained(folder)"
    check(not is_sharded(model), "model", what, "DTensors")
    config.__dict__.pop("auto_map", None)  # code that came with the dense model is not saved; our own is named anew
    check_rebuilds(model)
    nested = _nested(model)
    pretrained: Any = model
    with new_folder(path, overwrite, strangers) as folder:
        pretrained.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        elif target.is_dir():
            keep_tokenizer(target, folder)
        if nested is not None:
            nested.save(folder)
        _write_manifest(folder, model, facts or {}, {})
    return Path(path)


def save_around(model: Any, folder: Path, target: Path, tokenizer: Any, hashes: dict[str, str]) -> None:
    """Write what `save` writes beside the weights, which are in `folder` already.

    Args:
        model: on whatever device.
        folder: with its files of weights.
        target: the folder in whose place it will be put.
        tokenizer: as for `save`.
        hashes: SHA-256 of the files of weights.

    Raises:
        CheckpointError: as `save`.
    """
    config: Any = model.config
    config.__dict__.pop("auto_map", None)
    check_rebuilds(model)
    # As `save_pretrained` leaves them.
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif target.is_dir():
        keep_tokenizer(target, folder)
    _write_manifest(folder, model, {}, hashes)


# Transformers' tables of classes that write text, beside that of causal LMs.
_WRITERS = ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM")


def writer_of(config: Any) -> Any:
    """The class of Transformers that a checkpoint's config names, if that writes text and is no causal LM, or None."""
    names = getattr(config, "architectures", None)
    named = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not isinstance(named, type) or not issubclass(named, PreTrainedModel) or type(config) is not named.config_class:
        return None
    causal: Any = AutoModelForCausalLM._model_mapping
    tables = [getattr(transformers, auto)._model_mapping for auto in _WRITERS if hasattr(transformers, auto)]
    written = {name for table in tables for name in table._model_mapping.values()}
    return named if named.__name__ in written - set(causal._model_mapping.values()) else None


def class_of(config: Any) -> Any:
    """The class of Transformers that a checkpoint with this config is loaded with."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    return writer_of(config) or mapping[type(config)]


def _meta_shapes(config: Any, made: Any = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model built from `config`, without memory for them."""
    with torch.device("meta"):
        model = (made or class_of(config))(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_rebuilds(model: nn.Module) -> None:
    """Raise `CheckpointError` unless the model's config builds a model of its shapes; memory for none is needed."""
    config: Any = model.config
    wanted = _meta_shapes(type(config).from_dict(config.to_dict()), stock_class(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{name} has shape {shapes.get(name)} in the model, but its config builds {wanted.get(name)}; "
                "nothing was written"
            )


def check_narrows(model: nn.Module, block: dict[str, Any], widths: list[int]) -> None:
    """Try out, without memory for weights, whether `model` could be built again from its config with these widths.

    Args:
        model: a causal LM of Transformers; of another class, nothing is tried.
        block: what `families.ffn_block` gave for it.
        widths: neurons of each layer, none more than it has.

    Raises:
        UnsupportedModelError: its config cannot say so.
    """
    config: Any = copy.deepcopy(model.config)
    if not hasattr(transformers, type(model).__name__):
        return
    config.__dict__.pop("auto_map", None)
    where = block.get("config", "")
    own = widths if "modules" not in block else module_widths(block, widths)
    try:
        with torch.device("meta"):
            narrow: Any = stock_class(model)(config)
        part = heterogeneous.tower(narrow, config_at(config, where)) if where else narrow
        heterogeneous.resize(part, block, own)
        set_widths(narrow, block, widths)
        check_rebuilds(narrow)
    except Exception as error:  # whatever a config or a model of Transformers makes of such widths
        kind = "widths that differ by layer" if len(set(widths)) > 1 else f"a width of {widths[0]}"
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be saved with {kind}, so it is not pruned: {one_line(error)}"
        ) from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _float(value: dict[str, Any]) -> Any:
    """Infinity and the like, which Transformers writes as an object of one key."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def _bounded(raw: dict[str, Any]) -> dict[str, Any]:
    """Refuse a config that would build an enormous model, or none, before a config class of Transformers reads it."""
    parts = [raw]
    for part in parts:  # also configs of towers, which are inside; what users say of a run is theirs
        parts += [value for key, value in part.items() if isinstance(value, dict) and key != "pyprune"]
        for key in _DEPTH_KEYS:
            if isinstance(part.get(key), int) and not 0 <= part[key] <= _MOST_LAYERS:
                raise CheckpointError(f"config {key} must lie in [1, {_MOST_LAYERS}]; got {part[key]!r}")
    for key in families.WIDTH_KEYS:  # None and lists mean something to some families; their classes know
        value = raw.get(key)
        if value is not None and not isinstance(value, list) and not _is_whole(value):
            raise CheckpointError(f"config {key} must be an integer; got {value!r}")
    return raw


def _config_widths(config: Any) -> list[Any]:
    try:
        said = heterogeneous.parts(config)
        config = said[0] if said else text_config(config)
        entries = (provenance.read(config).get("ffn") or {}).get("modules")
        modules = None if entries is None else [(entry["at"], entry["width"]) for entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError):
        modules = None  # what builds the model will say what is wrong with it
    if modules is not None:
        return [_checked(width, f"width of {at}") for at, width in modules]
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointError(f"config num_hidden_layers must lie in [1, {_MOST_LAYERS}]; got {layers!r}")
    key = families.width_key(config)
    # None where the config has no such key, as GPT-1's.
    layers_of = config.per_layer_config if config.is_heterogeneous else None
    found: Any = getattr(config, key, None) if layers_of is None else [getattr(c, key) for c in layers_of]
    widths = list(found) if isinstance(found, list | tuple) else [found] * layers  # Gemma 3n's is a list
    for i, width in enumerate(widths):
        if width is None:  # GPT-2's way of saying 4 * hidden_size
            continue
        _checked(width, f"config {key} of layer {i}")
    return widths


def _checked(width: Any, argument: str) -> int:
    if not _is_whole(width) or not 1 <= width <= _WIDEST:
        raise CheckpointError(f"{argument} must lie in [1, {_WIDEST}]; got {width!r}")
    return int(width)


def read_config(folder: str | Path) -> Any:
    """The config of a checkpoint, of its family's class; no code of the checkpoint is run.

    Raises:
        CheckpointError: there is none, or Transformers or a model cannot make use of it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    try:
        raw = _bounded(json.loads(path.read_text(encoding="utf-8"), object_hook=_float))
        values = {k: v for k, v in raw.items() if k != "model_type"}
        config: Any = AutoConfig.for_model(str(raw.get("model_type")), **values)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a config class of Transformers makes of hostile values
        raise CheckpointError(f"{path} is not a usable config: {type(error).__name__}: {one_line(error)}") from error
    return config


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of a folder's safetensors files; no tensor is read.

    Raises:
        CheckpointError: no such file, or as `shards.read_header`.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file")
    return {name: place.shape for file in files for name, place in read_header(file).items()}


def check_fits(folder: str | Path) -> list[int]:
    """Compare a checkpoint's config with the shapes in its safetensors headers; return the FFN widths.

    Nothing of the size of the model is allocated.

    Raises:
        CheckpointError: a hostile or unusable config, damaged tensors, or widths that do not fit them.
    """
    folder = Path(folder)
    config = read_config(folder)
    widths = _config_widths(config)
    read_index(folder)
    shapes = tensor_shapes(folder)
    try:
        wanted = _meta_shapes(config)
        model_class: Any = class_of(config)
    except Exception as error:  # a config that no model class of Transformers accepts
        raise CheckpointError(
            f"{folder}/config.json builds no model: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not set(wanted) & set(shapes):  # a checkpoint of the bare decoder, as GPT-2's own
        shapes = {f"{model_class.base_model_prefix}.{name}": shape for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name in wanted and wanted[name] != shape:
            raise CheckpointError(f"{name} has shape {shape} in the file, but config.json says {wanted[name]}")
    if not set(wanted) & set(shapes):
        raise CheckpointError(f"{folder}: no tensor of the file belongs to the model that config.json builds")
    return widths


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
    for file in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]):
        name = file.relative_to(folder).as_posix()
        read = file.is_file() and (file.suffix in _LOADED or is_tokenizer(name))
        if read and name not in {*manifest["files"], MANIFEST}:
            raise CheckpointError(f"{name} lies in {folder}, but {MANIFEST} does not list it")
    widths = check_fits(folder)
    if widths != manifest["widths"]:
        raise CheckpointError(f"{MANIFEST} says widths {manifest['widths']}, config.json says {widths}")
    return manifest
