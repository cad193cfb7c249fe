"""What a model of fewer decoder layers looks like: its config, and what its layers know of their place in it.

Nothing here changes a model (see `surgery.drop_layers`). What a layer knows of its place is found by building the model
from its config twice, with all layers and with the kept ones, on the meta device, and comparing the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from ..base.errors import UnsupportedModelError
from .families import decoder_layers
from .heterogeneous import layer_widths

# Config keys that list layers by number.
NUMBER_LISTS = ("full_attn_idxs",)

_MISSING = object()


def keep_layers(config: Any, keep: Sequence[int]) -> None:
    """Make a config describe only the layers `keep`: their number, and every list with one entry a layer.

    Args:
        config: a Transformers config; changed in place.
        keep: sorted numbers of the layers that stay.
    """
    count = config.num_hidden_layers
    overrides = {int(i): entry for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    config.per_layer_config = None
    for key, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or "token" in key:  # several end tokens may be as many as layers
            continue
        if key in NUMBER_LISTS:
            setattr(config, key, type(value)(new for new, old in enumerate(keep) if old in value))
        elif key == "attention_types":  # GPT-Neo: groups of layers, written out in attention_layers
            setattr(config, key, [[[config.expand_attention_types_params(value)[i]], 1] for i in keep])
        elif len(value) == count:
            setattr(config, key, type(value)(value[i] for i in keep))
    config.num_hidden_layers = len(keep)
    kept = {new: overrides[old] for new, old in enumerate(keep) if old in overrides}
    config.per_layer_config = kept or None


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def differences(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """(module, attribute, old value, new value) of every plain attribute in which two modules of one build differ."""
    others = dict(old.named_modules())
    for name, module in new.named_modules():
        before, after = vars(others[name]), vars(module)
        for key in sorted(before.keys() | after.keys()):
            was, value = before.get(key, _MISSING), after.get(key, _MISSING)
            if (_plain(was) or _plain(value)) and was != value:
                yield name, key, was, value


def _is_number_of(was: Any, value: Any, old: int, new: int) -> bool:
    return type(was) is int and type(value) is int and (was, value) == (old, new)  # True is no 1 here


def _layout(module: nn.Module) -> dict[str, Any]:
    """Types of all submodules, shapes of all tensors that a checkpoint holds."""
    types: dict[str, Any] = {f"{name}()": type(m) for name, m in module.named_modules()}
    return types | {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _build(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """The model that the config of `model` builds with only the layers `keep`, without memory for it.

    FFN widths that differ by layer are left out: they go with their layers, whatever number these get.
    """
    own: Any = model.config
    config = type(own).from_dict(own.to_dict())
    if layer_widths(config) is not None:
        key = config.pyprune["ffn"]["width_key"]
        overrides = config.to_dict()["per_layer_config"].items()
        config.per_layer_config = {i: {k: v for k, v in entry.items() if k != key} for i, entry in overrides} or None
    keep_layers(config, keep)
    config = type(own).from_dict(config.to_dict())
    DynamicCache(config=config).get_seq_length()  # raises where no layer with attention is left to count the tokens
    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config)
    return built


def renumbering(model: nn.Module, keep: Sequence[int]) -> list[tuple[str, str, Any]]:
    """What must be set in a model's modules when only the layers `keep` stay.

    Args:
        model: a causal LM of Transformers; unchanged.
        keep: sorted numbers of the layers that stay.

    Returns:
        (path of a module in the whole model, attribute, new value), such as the layers' numbers that a key-value cache
        goes by.

    Raises:
        UnsupportedModelError: the family's config builds other layers from the shortened list than these, for instance
            because a layer computes with its number; so a checkpoint of them would not be this model.
    """
    name = type(model).__name__
    path, layers = decoder_layers(model)

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name} cannot do without {len(layers) - len(keep)} of its layers: {reason}")

    try:
        old, new = _build(model, range(len(layers))), _build(model, keep)
        old_layers, (new_path, new_layers) = decoder_layers(old)[1], decoder_layers(new)
    except Exception as error:  # whatever a config or model class makes of fewer layers
        raise refuse(f"its config builds no model of {len(keep)}: {type(error).__name__}: {error}") from error
    if new_path != path or len(new_layers) != len(keep):
        raise refuse(f"its config builds {len(new_layers)} layers at {new_path} for {len(keep)} at {path}")
    changes = []
    for number, (i, layer) in enumerate(zip(keep, new_layers, strict=True)):
        if _layout(old_layers[i]) != _layout(layer):
            raise refuse(f"layer {i} would be of another kind as layer {number}")
        for inner, key, was, value in differences(old_layers[i], layer):
            where = f"{path}.{i}.{inner}".rstrip(".")
            filtered = isinstance(was, list | tuple) and len(was) == len(layers) and value == [was[k] for k in keep]
            if not filtered and not _is_number_of(was, value, i, number):
                raise refuse(f"{where}.{key} is {was!r} in layer {i} and would be {value!r} as layer {number}")
            changes.append((where, key, value))
    for parent in (old, new):
        setattr(parent.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], nn.ModuleList())
    if _layout(old) != _layout(new):
        raise refuse("what stands beside the layers would change")
    for where, key, was, value in differences(old, new):
        if _is_number_of(was, value, len(layers), len(keep)):
            changes.append((where, key, value))
    return changes
