"""Where the decoder layers of a model are, and which of its configs speaks of them: by structure, not by names.

A language model has one list of layers; one that reads pictures or sound has a text tower beside others, and a config
of its own for it; an encoder-decoder has two lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..base.errors import UnsupportedModelError
from .experts import find_bank
from .patterns import match

Stack = tuple[str, nn.ModuleList]


def _has_ffn(layer: nn.Module) -> bool:
    """Whether a layer holds what might be an FFN or experts, accelerated ones too."""
    if any(hasattr(m, "record") for m in layer.modules()) or match(layer, in_layer=True):
        return True
    return any(match(m) or find_bank(n, m) for n, m in layer.named_modules())


def _outermost(found: list[Stack]) -> list[Stack]:
    return [(n, m) for n, m in found if not any(n.startswith(f"{o}.") for o, _ in found)]


def _lists(model: nn.Module) -> list[Stack]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]


def text_config(config: Any) -> Any:
    """The part of a config that speaks of the text's decoder; of a language model, all of it."""
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config


def decoder_layers(model: nn.Module) -> Stack:
    """The dotted path and the list of the model's decoder layers.

    Of several lists, the one of the text tower: under the head that makes logits, as long as the text's config says,
    the largest.

    Raises:
        UnsupportedModelError: no such list, several that are as good, or an encoder beside the decoder.
    """
    found = stacks(model)
    if len(found) == 1:
        return found[0]
    names = " and ".join(name for name, _ in found)
    raise UnsupportedModelError(
        f"{type(model).__name__} has an encoder beside its decoder ({names}): what works on one list of decoder layers "
        "alone does not take it"
    )


def stacks(model: nn.Module) -> list[Stack]:
    """The lists of layers whose FFNs belong together: one, or of an encoder-decoder both.

    Raises:
        UnsupportedModelError: none, or several where only one can be meant, which are named.
    """
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    every = _lists(model)
    likely = _outermost([(n, m) for n, m in every if len(m) and any(map(_has_ffn, m))])
    if getattr(config, "is_encoder_decoder", False):
        width = getattr(text_config(config), "hidden_size", None)
        sides = likely if len(likely) == 2 else [(n, m) for n, m in likely if _reads(m, width)]
        if len(sides) == 2:
            return sides
    fitting = [(n, m) for n, m in every if count and len(m) == count]
    outer = _outermost(fitting)
    if len(outer) == 1 and (len(likely) < 2 or outer[0] in likely):
        return outer
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(_no_model(model))
    named = {getattr(config, key, None) for key in ("num_layers", "n_layer", "n_layers", "num_decoder_layers")}
    if len(likely) == 1 and len(likely[0][1]) in named:  # it counts what stands in its layers
        return likely
    if count is None or len(likely) > 1:
        return [_text_tower(model, likely)]
    found = ", ".join(f"{n} ({len(m)})" for n, m in (outer or every)[:5]) or "no nn.ModuleList"
    wanted = f"{'one' if outer else 'a'} list of {count} decoder layers (config.num_hidden_layers)"
    raise UnsupportedModelError(f"{type(model).__name__} does not have {wanted}; found {found}")


def _no_model(model: nn.Module) -> str:
    """Why something is no model, and what to pass instead, as a sentence."""
    name, inner = type(model).__name__, getattr(model, "module", None)
    if isinstance(getattr(inner, "config", None), PreTrainedConfig):
        return f"{name} wraps a {type(inner).__name__}: pass what it wraps, model.module"
    return f"{name} is no model of Transformers: it has no config that says how many decoder layers there are"


def _text_tower(model: Any, likely: list[Stack]) -> Stack:
    name = type(model).__name__
    if not likely:
        raise UnsupportedModelError(
            f"{name} has no list of decoder layers with FFNs that pyprune knows; found "
            f"{', '.join(f'{n} ({len(m)})' for n, m in _lists(model)[:5]) or 'no nn.ModuleList'}"
        )
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    head = model.get_output_embeddings()
    width = getattr(head, "in_features", None) or getattr(text_config(model.config), "hidden_size", None)
    for fits in (lambda m: _reads(m, width), lambda m: len(m) == count):
        likely = [(n, m) for n, m in likely if fits(m)] or likely
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in likely]
    best = [stack for stack, size in zip(likely, sizes, strict=True) if size == max(sizes)]
    if len(best) > 1:
        raise UnsupportedModelError(
            f"{name} has several lists of layers that may be its text decoder, as large as each other: "
            f"{' and '.join(f'{n} ({len(m)})' for n, m in best)}; pass the part that you mean"
        )
    return best[0]


def _reads(layers: nn.ModuleList, width: int | None) -> bool:
    """Whether layers work on hidden states of a width, going by their norms and projections."""
    return any(width in p.shape for p in layers.parameters() if p.ndim < 3)


def _subs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The config and those inside it, with their dotted paths."""
    yield path, config
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _subs(inner, f"{path}.{key}".lstrip("."))


def owner(model: nn.Module, path: str) -> tuple[str, Any]:
    """The innermost model of Transformers around the module at `path`, and the path to it."""
    found: tuple[str, Any] = ("", model)
    parts = path.split(".")
    for i in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:i]))
        if isinstance(module, PreTrainedModel):
            found = ".".join(parts[:i]), module
    return found


def config_path(model: Any, path: str) -> str:
    """Where in the model's config the one is that the layers at `path` are built from; "" for the whole."""
    own = owner(model, path)[1].config
    parts = list(_subs(model.config))
    same = [p for p, c in parts if c is own] or [p for p, c in parts if type(c) is type(own)]
    return same[0] if same else ""


def config_at(config: Any, path: str) -> Any:
    """The config at a dotted path inside another."""
    for name in path.split(".") if path else []:
        config = getattr(config, name)
    return config


def copies(model: nn.Module, path: str) -> list[Any]:
    """All objects that hold the config at `path`: the one in the model's config, and what its parts were given."""
    main = config_at(model.config, path)
    found = [main]
    for module in model.modules():
        own = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) and type(own) is type(main) and not any(own is c for c in found):
            found.append(own)
    return found
