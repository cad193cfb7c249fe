"""FFN widths that differ by layer, inside stock Transformers models.

This file needs only torch and Transformers. A checkpoint whose widths differ carries a copy of it, so that it
loads with `trust_remote_code=True` where pyprune is not installed; `import pyprune` installs the same thing as a
hook (`install`), so that it loads with no flag. The widths stand in Transformers' own `per_layer_config`; where the
FFN's projections are stands in the config's `pyprune` block:

    {"ffn": {"layers": "layers", "width_key": "intermediate_size",
             "in": [["mlp.gate_proj", 1], ["mlp.up_proj", 1]], "out": "mlp.down_proj"}}

"layers" is a path inside `model.base_model`. Each entry of "in" is a projection into the FFN with the number of
neuron blocks stacked in it (2 where gate and up are fused); "out" is the projection back.

Where layers have no FFN, several, or experts, the block says each module by itself, and its width; the config's own
keys then say the widths before:

    {"ffn": {"modules": [
        {"at": "layers.0.mlp", "in": [["gate_proj", 1], ["up_proj", 1]], "out": "down_proj", "width": 40},
        {"at": "layers.1.mlp.experts", "experts": 8, "width": 12,
         "tensors": [["gate_up_proj", 1, 2, false], ["down_proj", 2, 1, false]]}]}}

A tensor of experts stands with the dimension of its neurons, the number of blocks of them along it, and whether these
take turns. A model with a text tower has the block in that tower's config.
"""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def select(parameter: nn.Parameter, dim: int, index: Tensor) -> None:
    """Keep only the slices `index` of `parameter` (and of its gradient) along `dim`.

    It stays the same object, so that optimizers that were made for it go on training it.
    """
    gradient = None if parameter.grad is None else parameter.grad.index_select(dim, index)
    exchange(parameter, parameter.detach().index_select(dim, index))
    parameter.grad = gradient


@torch.no_grad()
def exchange(parameter: nn.Parameter, new: Tensor) -> None:
    """Give a parameter other values, of another shape, and no gradient; it stays the same object."""
    parameter.grad = None
    # Autograd may remember the old shape, and forgets it only when the dtype changes.
    other = torch.float16 if new.dtype != torch.float16 else torch.float32
    parameter.data = new.new_empty(0, dtype=other)
    parameter.data = new


def narrow(projection: Any, index: Tensor, side: str) -> list[tuple[nn.Parameter, int, Tensor, torch.Size]]:
    """Keep only the `index` outputs (`side="out"`) or inputs (`side="in"`) of a Linear or Conv1D, in place.

    Returns:
        What became smaller: the parameter, along which dimension, the slices that stayed, and its shape before.
    """
    transposed = isinstance(projection, Conv1D)  # weight [in, out] instead of [out, in]
    cuts = [(projection.weight, int((side == "out") == transposed))]
    if side == "out" and projection.bias is not None:
        cuts.append((projection.bias, 0))
    index = index.to(projection.weight.device)
    done = [(parameter, dim, index, parameter.shape) for parameter, dim in cuts]
    for parameter, dim in cuts:
        select(parameter, dim, index)
    names = {("out", True): "nf", ("in", True): "nx", ("out", False): "out_features", ("in", False): "in_features"}
    setattr(projection, names[side, transposed], len(index))
    return done


def neurons_of(blocks: int, size: int, interleaved: bool) -> Tensor:
    """`[blocks, size]`: where the neurons of each block stand along their dimension."""
    index = torch.arange(blocks * size)
    return index.view(size, blocks).t() if interleaved else index.view(blocks, size)


def layer_widths(config: Any) -> list[int] | None:
    """FFN width of each layer, or module, from a config, or None when its own keys say them or it is not pyprune's."""
    ffn = (getattr(config, "pyprune", None) or {}).get("ffn")
    if ffn and "modules" in ffn:
        return [entry["width"] for entry in ffn["modules"]]
    if not ffn or not getattr(config, "is_heterogeneous", False):
        return None
    if ffn["width_key"] not in config.per_layer_attributes:
        return None
    return [getattr(layer, ffn["width_key"]) for layer in config.per_layer_config]


def parts(config: Any) -> list[Any]:
    """The config and those inside it that say widths."""
    inner = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    found = [config] if layer_widths(config) is not None else []
    return found + [p for c in inner if isinstance(c, PreTrainedConfig) for p in parts(c)]


def _check_width(width: Any, most: int, argument: str) -> None:
    if not isinstance(width, int) or not 1 <= width <= most:
        raise ValueError(f"{argument} must lie in [1, {most}]; got {width!r}")


def resize(model: Any, ffn: dict[str, Any], widths: list[int]) -> None:
    """Cut every FFN of a freshly built, full-width model down to its width in `widths`."""
    if "modules" in ffn:
        for entry, width in zip(ffn["modules"], widths, strict=True):
            for at in (entry["at"], *entry.get("also", ())):
                module: Any = model.base_model.get_submodule(at)
                (_resize_experts if "tensors" in entry else _resize)(module, entry, width, f"width of {at}")
        return
    layers: Any = model.base_model.get_submodule(ffn["layers"])
    for i, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        _resize(layer, ffn, width, f"per_layer_config[{i}].{ffn['width_key']}")


def _resize(holder: Any, ffn: dict[str, Any], width: int, argument: str) -> None:
    for path, blocks in ffn["in"]:
        if blocks not in (1, 2):
            raise ValueError(f"pyprune.ffn.in must stack 1 or 2 blocks in {path}; got {blocks!r}")
    out = holder.get_submodule(ffn["out"])
    full = out.nx if isinstance(out, Conv1D) else out.in_features
    _check_width(width, full, argument)
    if 0 not in out.weight.shape and out.weight.shape[0 if isinstance(out, Conv1D) else 1] != full:
        note_sizes(holder, ffn["in"], ffn["out"], width)  # it holds the parameters of one that is resized already
        return
    index = torch.arange(width)
    narrow(out, index, "in")
    for path, blocks in ffn["in"]:
        stacked = torch.cat([index + block * full for block in range(blocks)])
        narrow(holder.get_submodule(path), stacked, "out")


def note_sizes(holder: Any, inputs: Any, out: str, width: int) -> None:
    """Let the projections of an FFN know its width, where their parameters have it already."""
    projection = holder.get_submodule(out)
    setattr(projection, "nx" if isinstance(projection, Conv1D) else "in_features", width)
    for path, blocks in inputs:
        projection = holder.get_submodule(path)
        setattr(projection, "nf" if isinstance(projection, Conv1D) else "out_features", blocks * width)


def _resize_experts(module: Any, entry: dict[str, Any], width: int, argument: str) -> None:
    for name, dim, blocks, interleaved in reversed(entry["tensors"]):
        parameter = module.get_parameter(name)
        full = parameter.shape[dim] // blocks
        _check_width(width, full, argument)
        kept = neurons_of(blocks, full, interleaved)[:, :width]
        select(parameter, dim, (kept.t() if interleaved else kept).reshape(-1).to(parameter.device))
    note_width(module, full, width)


# Names of the numbers by which a module of experts knows its width.
SAYS_WIDTH = "intermediate|ffn|expert_dim"


def note_width(module: Any, full: int, width: int) -> None:
    """Let a module of experts, and those inside it, know its new width."""
    for part in module.modules():
        for key, value in vars(part).items():
            if value == full and type(value) is int and re.search(SAYS_WIDTH, key):
                setattr(part, key, width)


def _set_aside(config: Any, widths: list[int]) -> tuple[Any, Any, int | None]:
    """Make the config say full widths while the model is built; return what `_put_back` needs."""
    limit = 1 << 24  # far above any real FFN; a hostile width must not become an allocation
    ffn = config.pyprune["ffn"]
    key = None if "modules" in ffn else ffn["width_key"]
    for i, width in enumerate(widths):
        argument = f"width of {ffn['modules'][i]['at']}" if key is None else f"per_layer_config[{i}].{key}"
        _check_width(width, limit, argument)
    if key is None:
        config.pyprune = {k: v for k, v in config.pyprune.items() if k != "ffn"}
        return ffn, None, None
    overrides = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    saved = ffn, overrides, getattr(config, key, None)
    if hasattr(config, key):  # else the width is a fixed multiple of the hidden size, and all layers have it at first
        setattr(config, key, max(widths))
    return saved


def _put_back(config: Any, saved: tuple[Any, Any, int | None]) -> None:
    ffn, overrides, width = saved
    if overrides is None:
        config.pyprune = {**(config.pyprune or {}), "ffn": ffn}
        return
    if hasattr(config, ffn["width_key"]):
        setattr(config, ffn["width_key"], width)
    config.per_layer_config = overrides
    # Other code may ask for the one width: it gets the widest, as it stands in the config.
    config.allow_global_per_layer_attribute_access = True


def tower(model: Any, config: Any) -> Any:
    """The model, or the part of it, that is built from a config: the outermost whose config is of its type."""
    found = (m for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) is type(config))
    return next(found, model)


def pruned_class(base: Any) -> type:
    """A subclass of the Transformers model class `base` that builds each FFN at its own width."""

    @functools.wraps(base.__init__)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        said = [(part, layer_widths(part) or []) for part in parts(config)]
        saved = [(part, _set_aside(part, widths)) for part, widths in said]
        try:
            base.__init__(self, config, *args, **kwargs)
            for (part, widths), (_, kept) in zip(said, saved, strict=True):
                resize(tower(self, part), kept[0], widths)
        finally:
            for part, kept in saved:
                _put_back(part, kept)
        for part, kept in saved:  # the tower's own copy of the config was made without
            own = tower(self, part).config
            if own is not part:
                _put_back(own, kept)

    native = classmethod(lambda cls: False)  # its tensors are renamed on loading as those of `base` are
    words = {"__init__": init, "is_custom_code": native, "__module__": __name__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), words)


def install() -> None:
    """Let every `from_pretrained` in this process build pyprune's widths.

    Two documented points of `PreTrainedModel` are wrapped, `__init__` (the start of every model's construction) and
    `post_init` (its end); a model whose config has no pyprune widths passes through untouched.
    """
    if getattr(PreTrainedModel, "_pyprune_installed", False):
        return
    init, post_init = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(init)
    def wrapped_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        widths = layer_widths(config)
        saved = None
        if widths is not None:
            saved = _set_aside(config, widths)
            # Also when construction fails before its end: the config is put back when the half-built model goes.
            put_back = weakref.finalize(self, _put_back, config, saved)
            put_back.atexit = False
        try:
            init(self, config, *args, **kwargs)
        except BaseException:
            if saved is not None:
                put_back()
            raise
        if saved is not None:
            self.__dict__["_pyprune_widths"] = (saved[0], widths, put_back)

    @functools.wraps(post_init)
    def wrapped_post_init(self: Any) -> None:
        ffn, widths, put_back = self.__dict__.pop("_pyprune_widths", (None, None, None))
        if widths is not None:
            try:
                resize(self, ffn, widths)
            finally:
                put_back()
        post_init(self)

    hooked: Any = PreTrainedModel
    hooked.__init__ = wrapped_init
    hooked.post_init = wrapped_post_init
    hooked._pyprune_installed = True
