"""vLLM's plugin: checkpoints whose FFN widths differ by layer load with no flag.

vLLM calls `register` in each of its processes before it makes a model (entry point group `vllm.general_plugins`). Its
own model classes ask the config for one FFN width and hand it to parallel linear layers, each of which knows its name
in the model, such as `model.layers.3.mlp.down_proj`. So these layers take their own layer's width here instead,
whatever the family; where vLLM runs the modules of Transformers, `heterogeneous` has given them their widths already.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..base.errors import one_line
from ..model import heterogeneous

# vLLM's classes that FFNs are made of, with the argument that holds the width.
LINEARS = {
    "ColumnParallelLinear": "output_size",
    "MergedColumnParallelLinear": "output_sizes",
    "RowParallelLinear": "input_size",
}
_ALLOWED = "allow_global_per_layer_attribute_access"

log = logging.getLogger("vllm.pyprune")


def register() -> None:
    """Install the plugin in this process, or say in one line why not: vLLM goes on either way."""
    try:
        install()
    except Exception as error:  # whatever another version of vLLM lacks
        log.warning(
            "pyprune's plugin does not fit this vLLM and is off, so checkpoints whose FFN widths differ by layer do "
            "not load (export them with --to padded): %s",
            one_line(error),
        )


def install() -> None:
    """Wrap the constructors of vLLM's linear layers; a second call changes nothing.

    Raises:
        ImportError, AttributeError: this vLLM has no such classes.
        TypeError: their constructors take no such arguments.
    """
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    config = importlib.import_module("vllm.config")
    parallel = importlib.import_module("vllm.distributed").get_tensor_model_parallel_world_size
    current = config.get_current_vllm_config
    found = [(getattr(linear, name), argument) for name, argument in LINEARS.items()]
    for kind, argument in found:
        lacking = {argument, "prefix"} - set(inspect.signature(kind.__init__).parameters)
        if lacking:
            raise TypeError(f"{kind.__name__} takes no {', '.join(sorted(lacking))}")
    heterogeneous.install()
    _allow_the_widest()
    for kind, argument in found:
        if not getattr(kind.__init__, "_pyprune", False):
            kind.__init__ = _wrapped(kind.__init__, argument, lambda: current().model_config.hf_text_config, parallel)


def _allow_the_widest() -> None:
    """Let code that asks a config of ours for the one width have the widest, as `surgery.set_widths` does."""

    def allowed(self: Any) -> bool:
        ours = bool((self.__dict__.get("pyprune") or {}).get("ffn"))
        return bool(self.__dict__.get(_ALLOWED, ours))

    def allow(self: Any, value: bool) -> None:
        self.__dict__[_ALLOWED] = value

    setattr(PreTrainedConfig, _ALLOWED, property(allowed, allow))


def _wrapped(
    init: Callable[..., None], argument: str, config: Callable[[], Any], parallel: Callable[[], int]
) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        name, size = bound.arguments.get("prefix") or "", bound.arguments[argument]
        own = own_size(name, size, argument == "input_size", config) if name else size
        if own != size:
            degree = 1 if bound.arguments.get("disable_tp") else parallel()
            if any(part % degree for part in (own if isinstance(own, list) else [own])):
                raise ValueError(
                    f"{name} has {own} neurons, which tensor parallelism of {degree} must divide: prune with "
                    f"--multiple {degree}, or export the checkpoint with --to padded --multiple {degree}"
                )
            bound.arguments[argument] = own
        init(*bound.args, **bound.kwargs)

    wrapped._pyprune = True  # type: ignore[attr-defined]
    return wrapped


def own_size(name: str, size: Any, leaves: bool, config: Callable[[], Any]) -> Any:
    """The width that a linear layer has in its decoder layer.

    Args:
        name: of the linear layer in the model.
        size: the width that it was asked to have, or a list where it is several in one.
        leaves: it leads out of an FFN; else into one.
        config: gives the model's config.

    Returns:
        `size`, with the widest FFN's width replaced by that of the layer's own FFN where it belongs to one.
    """
    try:
        ours = config()
    except AssertionError:  # made outside of any model
        return size
    widths = heterogeneous.layer_widths(ours)
    if widths is None:
        return size
    ffn = ours.pyprune["ffn"]
    if "modules" in ffn:
        raise ValueError(
            "the checkpoint's widths differ from module to module (experts, several FFNs in a layer or none), which "
            "the plugin does not build: prune with allocation 'uniform', whose widths the config's own keys say"
        )
    place = re.search(rf"(?:^|\.){re.escape(ffn['layers'].rpartition('.')[2])}\.(\d+)\.(.+)$", name)
    if place is None or place[2].rpartition(".")[0] != ffn["out"].rpartition(".")[0]:
        return size
    width, widest = widths[int(place[1])], max(widths)
    blocks = 1 if leaves or isinstance(size, list) else ffn["in"][0][1]

    def own(asked: int) -> int:
        return width * blocks if asked == widest * blocks else asked

    return [own(part) for part in size] if isinstance(size, list) else own(size)
