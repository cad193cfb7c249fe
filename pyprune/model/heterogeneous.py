"""FFN widths that differ by layer, inside stock Transformers models.

This file needs only torch and Transformers. A checkpoint whose widths differ carries a copy of it, so that it
loads with `trust_remote_code=True` where pyprune is not installed; `import pyprune` installs the same thing as a
hook (`install`), so that it loads with no flag. The widths stand in Transformers' own `per_layer_config`; where the
FFN's projections are stands in the config's `pyprune` block:

    {"ffn": {"layers": "layers", "width_key": "intermediate_size",
             "in": [["mlp.gate_proj", 1], ["mlp.up_proj", 1]], "out": "mlp.down_proj"}}

"layers" is a path inside `model.base_model`. Each entry of "in" is a projection into the FFN with the number of
neuron blocks stacked in it (2 where gate and up are fused); "out" is the projection back.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def select(parameter: nn.Parameter, dim: int, index: Tensor) -> None:
    """Keep only the slices `index` of `parameter` (and of its gradient) along `dim`.

    It stays the same object, so that optimizers that were made for it go on training it.
    """
    new = parameter.detach().index_select(dim, index)
    gradient = None if parameter.grad is None else parameter.grad.index_select(dim, index)
    parameter.grad = None
    # Autograd may remember the old shape, and forgets it only when the dtype changes.
    other = torch.float16 if new.dtype != torch.float16 else torch.float32
    parameter.data = new.new_empty(0, dtype=other)
    parameter.data = new
    parameter.grad = gradient


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


def layer_widths(config: Any) -> list[int] | None:
    """FFN width of each layer from `per_layer_config`, or None when the config has none or is not pyprune's."""
    ffn = (getattr(config, "pyprune", None) or {}).get("ffn")
    if not ffn or not getattr(config, "is_heterogeneous", False):
        return None
    if ffn["width_key"] not in config.per_layer_attributes:
        return None
    return [getattr(layer, ffn["width_key"]) for layer in config.per_layer_config]


def resize(model: PreTrainedModel, ffn: dict[str, Any], widths: list[int]) -> None:
    """Cut every FFN of a freshly built, full-width model down to its width in `widths`."""
    for path, blocks in ffn["in"]:
        if blocks not in (1, 2):
            raise ValueError(f"pyprune.ffn.in must stack 1 or 2 blocks in {path}; got {blocks!r}")
    layers: Any = model.base_model.get_submodule(ffn["layers"])
    for i, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        out = layer.get_submodule(ffn["out"])
        full = out.nx if isinstance(out, Conv1D) else out.in_features
        if not isinstance(width, int) or not 1 <= width <= full:
            raise ValueError(f"per_layer_config[{i}].{ffn['width_key']} must lie in [1, {full}]; got {width!r}")
        index = torch.arange(width)
        narrow(out, index, "in")
        for path, blocks in ffn["in"]:
            stacked = torch.cat([index + block * full for block in range(blocks)])
            narrow(layer.get_submodule(path), stacked, "out")


def _set_aside(config: Any, widths: list[int]) -> tuple[dict[str, Any], int | None]:
    """Make the config homogeneous, at the widest width, while the model is built; return what `_put_back` needs."""
    key = config.pyprune["ffn"]["width_key"]
    limit = 1 << 24  # far above any real FFN; a hostile width must not become an allocation
    for i, width in enumerate(widths):
        if not isinstance(width, int) or not 1 <= width <= limit:
            raise ValueError(f"per_layer_config[{i}].{key} must lie in [1, {limit}]; got {width!r}")
    overrides = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    saved = overrides, getattr(config, key, None)
    if hasattr(config, key):  # else the width is a fixed multiple of the hidden size, and all layers have it at first
        setattr(config, key, max(widths))
    return saved


def _put_back(config: Any, saved: tuple[dict[str, Any], int | None]) -> None:
    overrides, width = saved
    key = config.pyprune["ffn"]["width_key"]
    if hasattr(config, key):
        setattr(config, key, width)
    config.per_layer_config = overrides
    # Other code may ask for the one width: it gets the widest, as it stands in the config.
    config.allow_global_per_layer_attribute_access = True


def pruned_class(base: Any) -> type:
    """A subclass of the Transformers model class `base` that builds each layer at its own FFN width."""

    @functools.wraps(base.__init__)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        widths = layer_widths(config)
        if widths is None:
            base.__init__(self, config, *args, **kwargs)
            return
        saved = _set_aside(config, widths)
        try:
            base.__init__(self, config, *args, **kwargs)
            resize(self, config.pyprune["ffn"], widths)
        finally:
            _put_back(config, saved)

    return type(base.__name__, (base,), {"__init__": init, "__module__": __name__, "__doc__": base.__doc__})


def install() -> None:
    """Let every `from_pretrained` in this process build pyprune's per-layer widths.

    Two documented points of `PreTrainedModel` are wrapped, `__init__` (the start of every model's construction) and
    `post_init` (its end); a model whose config has no pyprune widths passes through untouched.
    """
    if getattr(PreTrainedModel, "_pyprune_installed", False):
        return
    init, post_init = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(init)
    def wrapped_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        widths = layer_widths(config)
        if widths is not None:
            saved = _set_aside(config, widths)
            # Also when construction fails before its end: the config is put back when the half-built model goes.
            put_back = weakref.finalize(self, _put_back, config, saved)
            put_back.atexit = False
        init(self, config, *args, **kwargs)
        if widths is not None:
            self.__dict__["_pyprune_widths"] = (widths, put_back)

    @functools.wraps(post_init)
    def wrapped_post_init(self: Any) -> None:
        widths, put_back = self.__dict__.pop("_pyprune_widths", (None, None))
        if widths is not None:
            try:
                resize(self, self.config.pyprune["ffn"], widths)
            finally:
                put_back()
        post_init(self)

    hooked: Any = PreTrainedModel
    hooked.__init__ = wrapped_init
    hooked.post_init = wrapped_post_init
    hooked._pyprune_installed = True
