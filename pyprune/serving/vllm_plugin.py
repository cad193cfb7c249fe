"""vLLM's plugin: checkpoints whose FFN widths differ by layer load with no flag.

vLLM calls `register` in each of its processes before it makes a model (entry point group `vllm.general_plugins`). Its
own model classes ask the config for one FFN width and hand it to parallel linear layers, each of which knows its name
in the model, such as `model.layers.3.mlp.down_proj`. So these layers take their own layer's width here instead,
whatever the family; where vLLM runs the modules of Transformers, `heterogeneous` has given them their widths already.

What a user asks for beyond that stands in `--additional-config '{"pyprune": {...}}'` (see `VllmOptions`): between the
making of a model and the packing of its weights, a mask narrows what is loaded, and records take the place of FFNs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedConfig

from ..base.errors import one_line
from ..model import heterogeneous
from .vllm_contest import take_over
from .vllm_ffn import RecordFFN
from .vllm_mask import Cut
from .vllm_options import VllmOptions

# vLLM's classes that FFNs are made of, with the argument that holds the width.
LINEARS = {
    "ColumnParallelLinear": "output_size",
    "MergedColumnParallelLinear": "output_sizes",
    "RowParallelLinear": "input_size",
}
_ALLOWED = "allow_global_per_layer_attribute_access"

# The config of a model that vLLM makes beside the one of its current config, such as a draft.
_DRAFT: ContextVar[Any] = ContextVar("draft", default=None)

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
    """Wrap the constructors of vLLM's linear layers, and steps of its loader; a second call changes nothing.

    Raises:
        ImportError, AttributeError: this vLLM has no such classes.
        TypeError: they take no such arguments.
    """
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    config = importlib.import_module("vllm.config")
    parallel = importlib.import_module("vllm.distributed").get_tensor_model_parallel_world_size
    current = config.get_current_vllm_config
    loader = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    files = importlib.import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader
    found = [(getattr(linear, name), argument) for name, argument in LINEARS.items()]
    for kind, argument in found:
        _check_takes(kind.__init__, kind.__name__, argument, "prefix")
    steps = [(getattr(*place), place, made, takes) for place, made, takes in _steps(loader, files)]
    for step, place, _, takes in steps:
        _check_takes(step, place[1], *takes)
    heterogeneous.install()
    _allow_the_widest()
    for kind, argument in found:
        if not getattr(kind.__init__, "_pyprune", False):
            kind.__init__ = _wrapped(kind.__init__, argument, lambda: _text_config(current), parallel)
    for step, (owner, name), made, _ in steps:
        if not getattr(step, "_pyprune", False):
            setattr(owner, name, made(step))


def _text_config(current: Callable[[], Any]) -> Any:
    """The config of the model that is being made."""
    return (_DRAFT.get() or current().model_config).hf_text_config


def _check_takes(function: Any, name: str, *arguments: str) -> None:
    if lacking := sorted(set(arguments) - set(inspect.signature(function).parameters)):
        raise TypeError(f"{name} takes no {', '.join(lacking)}")


def _steps(loader: Any, files: Any) -> list[tuple[tuple[Any, str], Callable[[Any], Any], tuple[str, ...]]]:
    """Steps of loading a model: whose they are and their names, what takes their place, and arguments that it needs."""
    return [
        ((loader, "initialize_model"), _made, ("vllm_config",)),
        ((files, "get_all_weights"), _read, ("model",)),
        ((loader, "process_weights_after_loading"), _packed, ("model",)),
    ]


def _argument(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    return inspect.signature(function).bind(*args, **kwargs).arguments.get(name)


def _step(function: Any) -> Callable[[Any], Any]:
    """What takes the place of a step of loading, and is never replaced itself."""

    def mark(replacement: Any) -> Any:
        replacement = functools.wraps(function)(replacement)
        replacement._pyprune = True
        return replacement

    return mark


def _made(initialize: Any) -> Any:
    @_step(initialize)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        config = _argument(initialize, "vllm_config", args, kwargs)
        options = VllmOptions.of(config.additional_config)
        if getattr(config, "lora_config", None) is not None:
            options = options.with_adapters()
        own = _argument(initialize, "model_config", args, kwargs) or config.model_config
        cut = None
        if options.mask is not None and not _is_draft(config, own):
            cut = Cut(own.model, options.mask)
            cut.narrow_config(own.hf_text_config)
        draft = _DRAFT.set(None if own is config.model_config else own)
        try:
            model = initialize(*args, **kwargs)
        finally:
            _DRAFT.reset(draft)
        model._pyprune_options, model._pyprune_cut = options, cut
        return model

    return initialize_model


def _is_draft(config: Any, own: Any) -> bool:
    """Whether a model is what speculative decoding drafts with: by a config beside the target's, or in its place."""
    speculation = getattr(config, "speculative_config", None)
    drafts = getattr(speculation, "draft_model_config", None) is own
    return own is not config.model_config or (drafts and getattr(speculation, "target_model_config", None) is not own)


def _read(get_all_weights: Any) -> Any:
    @_step(get_all_weights)
    def narrowed(*args: Any, **kwargs: Any) -> Any:
        weights = get_all_weights(*args, **kwargs)
        cut = getattr(_argument(get_all_weights, "model", args, kwargs), "_pyprune_cut", None)
        return weights if cut is None else cut.narrow(weights)

    return narrowed


def _packed(process: Any) -> Any:
    @_step(process)
    def process_weights_after_loading(*args: Any, **kwargs: Any) -> Any:
        model = _argument(process, "model", args, kwargs)
        options = getattr(model, "_pyprune_options", None)
        if options is not None:
            take_over(model, options)
            _tell_compiler(model)
        return process(*args, **kwargs)

    return process_weights_after_loading


def _tell_compiler(model: Any) -> None:
    """Let vLLM name stored compilations by the FFNs that run from records, which it loads without any check.

    Which FFNs these are is measured at each start; an operator in a stored graph knows its FFN by `RecordFFN.key`.
    """
    ours = {
        name: f"record, {module.native_tokens} tokens" if module.own is None else f"beside, {module.key}"
        for name, module in model.named_modules()
        if isinstance(module, RecordFFN)
    }
    configs = {
        id(module.vllm_config): module.vllm_config for module in model.modules() if hasattr(module, "vllm_config")
    }
    for config in configs.values() if ours else ():
        config.additional_config = {**(config.additional_config or {}), "pyprune.ffns": ours}


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
        # A constructor that this one calls gets its sizes, which are the layer's own already.
        first = self.__dict__.setdefault("_pyprune_sized", argument) == argument
        own = own_size(name, size, argument == "input_size", config) if name and first else None
        if own is not None:
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
        `size`, with the widest FFN's width replaced by that of the layer's own FFN; None where it belongs to none, or
        to a layer that the config does not count.
    """
    try:
        ours = config()
    except AssertionError:  # made outside of any model
        return None
    widths = heterogeneous.layer_widths(ours)
    if widths is None:
        return None
    ffn = ours.pyprune["ffn"]
    if "modules" in ffn:
        raise ValueError(
            "the checkpoint's widths differ from module to module (experts, several FFNs in a layer or none), which "
            "the plugin does not build: prune with allocation 'uniform', whose widths the config's own keys say"
        )
    place = re.search(rf"(?:^|\.){re.escape(ffn['layers'].rpartition('.')[2])}\.(\d+)\.(.+)$", name)
    if place is None or place[2].rpartition(".")[0] != ffn["out"].rpartition(".")[0]:
        return None
    layer = int(place[1])
    if layer >= len(widths):
        return None
    width, widest = widths[layer], max(widths)
    blocks = 1 if leaves or isinstance(size, list) else ffn["in"][0][1]
    parts = size if isinstance(size, list) else [size]
    if widest * blocks not in parts:
        return None
    own = [width * blocks if part == widest * blocks else part for part in parts]
    return own if isinstance(size, list) else own[0]
