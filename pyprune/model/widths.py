"""How a config says FFN widths, and the block beside it that says what its own keys cannot.

Where every layer has one FFN of one form, and the config has a key for its width, that key says one width, and
Transformers' `per_layer_config` widths that differ. Elsewhere (experts, layers without an FFN, several FFNs in a layer,
two lists of layers, or a width that is only derived from a key) keys say what they can: which modules follow which key
is tried out. What they cannot say stands module by module in the block.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import UnsupportedModelError
from . import provenance
from .towers import config_at, config_path, copies, owner, stacks
from .units import FFN, Expert, groups

WIDTH_KEYS = ("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")

# Of families without any of them.
OWN_WIDTH_KEY = "intermediate_size"

# Config keys that make a family's projections carry a bias where the dense model has none.
BIAS_KEYS = ("mlp_bias",)

# Config keys by which a family derives the FFN width, and the value that makes it take the width as it stands.
WIDTH_AS_IT_STANDS: dict[str, Any] = {"block_auto_adjust_ff_dim": False}

# Keys that may say a width, of which every one is tried.
_MAY_SAY = re.compile(
    r"intermediate|ffn|inner|^d_ff$|^dff$|dim_ff|ff_dim|mlp_dim|expert.*dim|^n_inner$|moe.*(size|dim)"
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


def plain(model: nn.Module, ffns: list[FFN]) -> bool:
    """Whether the model has one list of layers, each of which has one FFN, all of one form."""
    lists = stacks(model)
    if len(lists) != 1 or len(ffns) != len(lists[0][1]) or any(f.shared or isinstance(f, Expert) for f in ffns):
        return False
    forms = {(f.pattern, f.name.removeprefix(f"{lists[0][0]}.{f.block}")) for f in ffns}
    return len(forms) == 1 and [f.block for f in ffns] == list(range(len(ffns)))


def _follows(config: Any, ffns: list[FFN]) -> bool:
    """Whether a config's width key, or its `per_layer_config` of pyprune's, says the widths as they are."""
    if getattr(config, "is_heterogeneous", False):
        return bool(provenance.read(config).get("ffn"))
    value = getattr(config, width_key(config), None)
    if isinstance(value, list) or getattr(config, "num_hidden_layers", None) != len(ffns):
        return False
    derived = any(hasattr(config, key) for key in WIDTH_AS_IT_STANDS)
    return not isinstance(value, int) or derived or value == max(f.intermediate_size for f in ffns)


def ffn_block(model: nn.Module, ffns: list[FFN]) -> dict[str, Any]:
    """The description of the FFNs that a checkpoint's config carries where its keys do not say the widths.

    See `heterogeneous` for its two forms. `config` is where in the model's config it stands, if not at its top.
    """
    lists = stacks(model)
    list_name, layers = lists[0]
    where = config_path(model, list_name) if len(lists) == 1 else ""
    config = config_at(model.config, where)
    root: Any = owner(model, list_name)[1] if where else model
    base = {id(m): n for n, m in root.base_model.named_modules()}
    outside = [f.name for f in ffns if id(f.holder) not in base]
    if outside:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {outside[0]} is no part of its base model ({type(root.base_model).__name__}), "
            "from which widths are counted: pass the part of the model that holds it"
        )
    if plain(model, ffns) and _follows(config, ffns) and _alone(model, where, ffns):
        pattern = ffns[0].pattern
        inner = ffns[0].name.removeprefix(f"{list_name}.0").removeprefix(".")
        dot = f"{inner}." if inner else ""
        return {
            **({"config": where} if where else {}),
            "layers": base[id(layers)],
            "width_key": width_key(config),
            "in": [[dot + name, blocks] for name, blocks in pattern.inputs],
            "out": dot + pattern.down,
        }
    modules = [_entry(f, base) for group in groups(ffns) for f in (group[:1] if _banked(group) else group)]
    inside = {"config": where} if where else {}
    return {**inside, "modules": modules, "keys": _keys(model, where, modules)}


def _banked(group: list[FFN]) -> bool:
    return isinstance(group[0], Expert)


def _entry(ffn: FFN, base: dict[int, str]) -> dict[str, Any]:
    """Where one module is, and which of its projections or tensors have neurons, and along which side."""
    at, also = base[id(ffn.holder)], [base[id(module)] for _, module in ffn.twins]
    if isinstance(ffn, Expert):
        bank = ffn.of_bank
        return {"at": at, "experts": bank.experts, "tensors": bank.sides(), "width": bank.size}
    inputs = [[name, blocks] for name, blocks in ffn.pattern.inputs]
    entry = {"at": at, "in": inputs, "out": ffn.pattern.down, "width": ffn.intermediate_size}
    return {**entry, "also": also} if also else entry


def built(model: Any, where: str, changes: dict[str, Any] | None = None, keep_block: bool = False) -> Any:
    """What the model's class builds, without memory for weights, with changes in the config at `where`.

    Widths that stand module by module are left out unless `keep_block`.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    inner = config_at(config, where)
    if not keep_block and "modules" in (provenance.read(inner).get("ffn") or {}):
        provenance.set_ffn(inner, None)
    for key, value in (changes or {}).items():
        setattr(inner, key, value)
    config.__dict__.pop("auto_map", None)
    with torch.device("meta"):
        found = stock_class(model)(copy.deepcopy(config))
    return found


def _base(model: Any, where: str) -> Any:
    """The part of a model that a block's paths start at."""
    return (owner(model, stacks(model)[0][0])[1] if where else model).base_model


def _others(model: nn.Module, ours: list[nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model but those of these modules."""
    own = {id(p) for module in ours for p in module.parameters()}
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in own}


def _alone(model: Any, where: str, ffns: list[FFN]) -> bool:
    """Whether the width key of a tower's config says the width of its FFNs and of nothing else in the model."""
    if not where:
        return True
    key = width_key(config_at(model.config, where))
    shapes = []
    try:
        for factor in (1, 2):
            found = built(model, where, {key: factor * ffns[0].intermediate_size})
            shapes.append(_others(found, [found.get_submodule(f.name) for f in ffns]))
    except Exception:  # whatever a class makes of a config: then each module is said by itself
        return False
    return shapes[0] == shapes[1]


def stock_class(model: nn.Module) -> Any:
    """The class of Transformers of a model, by its name: another one's subclass may build something else."""
    return getattr(transformers, type(model).__name__, type(model))


def _widths_in(base: nn.Module, modules: list[dict[str, Any]]) -> list[int]:
    """The widths that these modules have in a model that was built."""
    found = []
    for entry in modules:
        module: Any = base.get_submodule(entry["at"])
        if "tensors" in entry:
            name, dim, blocks, _ = entry["tensors"][-1]
            found.append(module.get_parameter(name).shape[dim] // blocks)
        else:
            out: Any = module.get_submodule(entry["out"])
            found.append(out.nx if isinstance(out, Conv1D) else out.in_features)
    return found


def _of(model: nn.Module, where: str, modules: list[dict[str, Any]]) -> list[nn.Module]:
    """The modules of a block, in a model that was built."""
    base = _base(model, where)
    return [base.get_submodule(at) for entry in modules for at in (entry["at"], *entry.get("also", ()))]


def _keys(model: nn.Module, where: str, modules: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Which modules follow which key: their widths double with it."""
    config = config_at(model.config, where)
    found = {}
    try:
        dense = built(model, where)
        full, rest = _widths_in(_base(dense, where), modules), _others(dense, _of(dense, where, modules))
    except Exception:  # whatever a class makes of a config: then no key says anything
        return {}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and _MAY_SAY.search(key) and value == full:
            return {key: list(range(len(full)))}  # one width a module, as it stands
        if type(value) is not int or value < 2 or not _MAY_SAY.search(key):
            continue
        try:
            double = built(model, where, {key: 2 * value})
            twice = _widths_in(_base(double, where), modules)
            if _others(double, _of(double, where, modules)) != rest:
                continue  # something else follows it too
        except Exception:  # as above
            continue
        follow = [i for i, (a, b) in enumerate(zip(full, twice, strict=True)) if b == 2 * a]
        if follow and sum(a != b for a, b in zip(full, twice, strict=True)) == len(follow):
            found[key] = follow
    return found


def module_widths(block: dict[str, Any], widths: list[int]) -> list[int]:
    """One width a module of the block, from one an FFN."""
    given = iter(widths)
    found = []
    for entry in block["modules"]:
        own = [next(given) for _ in range(entry.get("experts", 1))]
        assert len(set(own)) == 1, "experts of a bank have one width"
        found.append(own[0])
    return found


def said_by_keys(model: Any, block: dict[str, Any], widths: list[int]) -> dict[str, Any] | None:
    """Values of config keys with which the model's class builds these widths (one a module), or None."""
    where = block.get("config", "")
    config = config_at(model.config, where)
    try:
        full = _widths_in(_base(built(model, where), where), block["modules"])
        values: dict[str, Any] = {}
        for key, follow in block["keys"].items():
            value = getattr(config, key)
            if isinstance(value, list):
                values[key] = [widths[i] for i in follow]
                continue
            wanted = {value * widths[i] / full[i] for i in follow}
            if len(wanted) == 1 and (one := wanted.pop()) == int(one):
                values[key] = int(one)
        if _widths_in(_base(built(model, where, values), where), block["modules"]) == widths:
            return values
    except Exception:  # whatever a class makes of such widths: then they are said module by module
        return None
    return None


def set_widths(model: nn.Module, block: dict[str, Any], widths: list[int]) -> None:
    """Write FFN widths into the model's config: the family's own keys, and the block where they cannot say them.

    Args:
        model: the model.
        block: what `ffn_block` gave for it.
        widths: neurons of each FFN.
    """
    forget_nested(model)
    where = block.get("config", "")
    if "modules" in block:
        own = module_widths(block, widths)
        values = said_by_keys(model, block, own)
        entries = [{**entry, "width": width} for entry, width in zip(block["modules"], own, strict=True)]
        for config in copies(model, where):
            for key, value in (values or {}).items():
                setattr(config, key, value)
            provenance.set_ffn(config, {"modules": entries} if values is None else None)
        return
    for config in copies(model, where):
        set_layers(config, {k: v for k, v in block.items() if k != "config"}, widths)


def set_layers(config: Any, block: dict[str, Any], widths: list[int]) -> None:
    """Widths of layers of one form."""
    key = block["width_key"]
    config.per_layer_config = None
    for name, value in WIDTH_AS_IT_STANDS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    told = has_width(config)
    if told:
        setattr(config, key, max(widths))
    differ = len(set(widths)) > 1 or not told
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    if differ:
        config.per_layer_config = {i: {key: width} for i, width in enumerate(widths)}
        # Code of others that asks for the one width gets the widest, not an error.
        config.allow_global_per_layer_attribute_access = True
    provenance.set_ffn(config, block if differ else None)


def forget_nested(model: nn.Module) -> None:
    """Drop what the model's config says of nested widths: its layers are not those any more."""
    provenance.forget_nested(model.config)
    model.__dict__.pop("pyprune_nested", None)
