"""Models whose weights accelerate's hooks keep elsewhere (`device_map` with cpu or disk): a layer at a time comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError
from . import families
from .described import Described
from .pages import check_values
from .towers import decoder_layers


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate bring weights that are not there."""
    absent = any(p.is_meta for p in model.parameters())
    return absent and any(True for module in model.modules() for _ in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Those of a module that bring its weights for each forward, and take them away again."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            yield one


def _origin(weights: Any, name: str) -> tuple[Any, str]:
    """The map that a hook's map looks into: a dictionary or a loader of accelerate's; and the name there."""
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, weights.prefix + name
    return weights, name


def _keep(weights: Any, name: str, values: Tensor) -> None:
    """Let a hook's map of weights give these, from main memory or the disk as those before."""
    weights, name = _origin(weights, name)
    if isinstance(weights, dict):
        weights[name] = values.cpu()
    elif name in weights.state_dict or name not in weights.index:
        weights.state_dict[name] = values.cpu()
        weights.all_keys += [name] if name not in weights.all_keys else []
    else:
        from accelerate.utils import offload_weight  # there, for these hooks are

        offload_weight(values.cpu(), name, weights.save_folder, weights.index)


class OffloadedLayers:
    """The layers of such a model, each there only between `need` and `drop`; narrower ones go back where they were.

    Args:
        model: a causal LM of Transformers, whose layers each have one FFN of one form.

    Attributes:
        described: it, dense.

    Raises:
        UnsupportedModelError: a model of another kind, or hooks that keep buffers elsewhere too, or weights on the disk
            without a folder for new ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.described = Described(model, absent=True)
        kind = type(model).__name__
        rule = "a model whose weights accelerate's hooks keep elsewhere"
        if not self.described.plain or not self.described.streamed:
            raise UnsupportedModelError(
                f"{kind}: {rule} must have layers with one FFN of one form each: load this one whole, with a "
                "device_map that names neither 'cpu' beside a GPU nor 'disk'"
            )
        if any(buffer.is_meta for buffer in model.buffers()):
            raise UnsupportedModelError(f"{kind}: {rule} must have its buffers there: load it without offload_buffers")
        origins = [_origin(h.weights_map, "")[0] for module in model.modules() for h in _hooks(module)]
        if any(getattr(one, "index", None) and one.save_folder is None for one in origins):
            raise UnsupportedModelError(
                f"{kind}: its weights are on the disk, and narrower ones need a folder: load it with offload_folder=, "
                "or prune its own folder (pyprune prune --stream)"
            )
        self._layers = list(decoder_layers(model)[1])
        self._own = {id(module) for ffn in self.described.ffns for module in ffn.holder.modules()}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._there: dict[int, list[tuple[nn.Module, Any]]] = {}

    def _bring(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
        found = []
        for module in modules:
            for hook in _hooks(module):
                for name, parameter in list(module.named_parameters(recurse=hook.place_submodules)):
                    if name in hook.weights_map:
                        values = hook.weights_map[name]
                        check_values(f"{self._names[id(module)]}.{name}", values)
                    else:  # given by a repair: zeros, as it gives them
                        values = torch.zeros(parameter.shape, dtype=parameter.dtype)
                    values = values.to(torch.device(hook.execution_device), parameter.dtype, copy=True)
                    self._put(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
                found.append((module, hook))
                hook.offload = False  # so that it leaves them there
        return found

    @staticmethod
    def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        path, _, key = name.rpartition(".")
        module.get_submodule(path)._parameters[key] = parameter

    def _take(self, found: list[tuple[nn.Module, Any]], changed: bool = False) -> None:
        for module, hook in found:
            for name, parameter in list(module.named_parameters(recurse=hook.place_submodules)):
                if changed and (id(module) in self._own or name not in hook.weights_map):
                    _keep(hook.weights_map, name, parameter.detach())
                meta = torch.empty_like(parameter, device="meta")
                self._put(module, name, nn.Parameter(meta, requires_grad=parameter.requires_grad))
            hook.offload = True

    def need(self, layer: int) -> None:
        """Let a layer's weights be on the device that computes it.

        Raises:
            InputError: weights that are not finite.
        """
        self._there.setdefault(layer, []).extend(self._bring(self._layers[layer].modules()))

    def drop(self, layer: int, changed: bool = False) -> None:
        """Let them be where they were; where they are `changed`, as they are now."""
        self._take(self._there.pop(layer, []), changed)

    def drop_all(self) -> None:
        """After an error, in which a layer may be cut."""
        for layer in list(self._there):
            self.drop(layer, changed=True)

    @contextmanager
    def front(self) -> Iterator[None]:
        """Inside, what stands in front of the layers is there, and the first layer."""
        behind = {id(m) for layer in self._layers for m in layer.modules()}
        behind.add(id(self._model.get_output_embeddings()))
        found = self._bring(m for m in self._model.modules() if id(m) not in behind)
        self.need(0)
        try:
            yield
        finally:
            self.drop(0)
            self._take(found)

    def fingerprint(self) -> str:
        """As `families.fingerprint`; reads every layer once."""
        samples = []
        for ffn in self.described.ffns:
            self.need(ffn.block)
            samples.append(families.sample(ffn))
            self.drop(ffn.block)
        return families.fingerprint_of(self._model, samples)
