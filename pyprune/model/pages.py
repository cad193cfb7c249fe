"""A model whose weights stay on the disk: it is on the meta device, and read from its shards a layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from ..base.errors import CheckpointError, UnsupportedModelError, check
from . import checkpoint
from .described import Described
from .families import FFN
from .heterogeneous import narrow
from .shard_writer import Planned
from .shards import DTYPES, Shards
from .towers import decoder_layers
from .transfer import Transfer
from .weights import all_finite

CPU = torch.device("cpu")


@contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Inside, parameters that modules register go to the meta device, in `dtype`; buffers are computed as ever."""
    register, before = nn.Module.register_parameter, torch.get_default_dtype()

    def registering(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    hooked: Any = nn.Module
    hooked.register_parameter = registering
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        hooked.register_parameter = register
        torch.set_default_dtype(before)


def _dtype(config: Any, shards: Shards) -> torch.dtype:
    """What the config says, or where it says nothing what the first tensor is in."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    held = [DTYPES.get(place.dtype) for place in shards.places.values()]
    return next((dtype for dtype in held if dtype is not None and dtype.is_floating_point), torch.float32)


def check_values(name: str, values: Tensor) -> None:
    """Raise `InputError` where values of the tensor `name` are not finite."""
    check(all_finite(values), "model", "have finite weights", f"NaN or infinity in {name}")


class Pages:
    """A causal LM that is read from a folder, a layer at a time; no other weights are in memory.

    Args:
        folder: a checkpoint of safetensors, of a model whose layers each have one FFN of one form.
        device: where what was read is put.

    Attributes:
        model: on the meta device but for what was read; buffers are on `device`.
        transfer: to and from `device`; None where that is the CPU.
        described: it, dense.
        layers: its decoder layers.
        shards: where its tensors are.
        outside: names of the tensors that belong to no layer.

    Raises:
        CheckpointError: a folder whose config and tensors do not fit each other, in shape, dtype or name.
        UnsupportedModelError: a model of another kind, or a quantised one.
    """

    def __init__(self, folder: str | Path, device: torch.device = CPU) -> None:
        folder = Path(folder)
        self.device, self.transfer = device, None if device.type == "cpu" else Transfer(device)
        self.shards = Shards(folder)
        checkpoint.check_fits(folder)
        config: Any = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(f"{folder} is quantised: load the model unquantised, prune it, then quantise")
        self.dtype = _dtype(config, self.shards)
        with parameters_on_meta(self.dtype):
            self.model: Any = checkpoint.class_of(config)(config).eval()
        config.dtype = self.dtype
        if self.model.can_generate() and (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        kind = type(self.model).__name__
        self.described = Described(self.model, absent=True)
        if not self.described.plain or not self.described.streamed:
            raise UnsupportedModelError(
                f"stream takes models whose layers each have one FFN of one form; {kind} has experts, several FFNs in "
                "a layer, layers without one, or an encoder: prune it in memory, without stream"
            )
        for module in self.model.modules():
            for key, values in module._buffers.items():
                if values is not None and not values.is_meta:
                    module._buffers[key] = values.to(device)
        path, layers = decoder_layers(self.model)
        self.layers, self._path = list(layers), path
        self._known = self._names(kind)
        self._check_dtypes()
        self._reader = ThreadPoolExecutor(1, "reading a layer")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def _names(self, kind: str) -> dict[str, str]:
        """The names of the model's tensors, with those that the shards give them; of tied ones one."""
        base = f"{self.model.base_model_prefix}."
        state = self.model.state_dict(keep_vars=True)
        bare = not any(name in self.shards for name in state)  # a checkpoint of the bare decoder, as GPT-2's own
        known: dict[str, str] = {}
        owners: dict[int, str] = {}
        absent: dict[int, str] = {}
        for name, tensor in state.items():
            said = name.removeprefix(base) if bare else name
            if said not in self.shards:
                absent.setdefault(id(tensor), name)
            elif id(tensor) not in owners:
                owners[id(tensor)] = name
                known[name] = said
            elif not self.shards.same(known[owners[id(tensor)]], said):
                raise CheckpointError(
                    f"{owners[id(tensor)]} and {name} are one tensor by the config, and differ in the folder: set "
                    "tie_word_embeddings to false in its config.json, or prune the model in memory"
                )
        missing = [name for key, name in absent.items() if key not in owners]
        if missing:
            strange = sorted(self.shards.places.keys() - known.values())
            # Transformers renames tensors of some families on loading, as GPT-NeoX's embed_out.
            hint = (
                f"; it has {strange[0]}: where that is the same under another name, prune it in memory"
                if strange
                else ""
            )
            raise CheckpointError(f"{kind} lacks {len(missing)} tensors in the folder, the first is {missing[0]}{hint}")
        self.outside = [name for name in known if not name.startswith(f"{self._path}.")]
        return known

    def _check_dtypes(self) -> None:
        for said in self._known.values():
            place = self.shards.places[said]
            held = DTYPES.get(place.dtype)
            if held is None or (held.is_floating_point and held != self.dtype):
                raise CheckpointError(
                    f"{said} is {place.dtype} in {place.file.name}, but config.json says {self.dtype}: with stream "
                    "weights are not converted; prune the model in memory, or convert it first"
                )

    @property
    def layer_bytes(self) -> int:
        """Of the largest layer's tensors in the shards."""
        layers = ([self._known.get(name) for name in self.names(i)] for i in range(len(self.layers)))
        return max(sum(self.shards.places[said].size for said in layer if said) for layer in layers)

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def names(self, layer: int) -> list[str]:
        """Of a layer's tensors, in the order of the model; those that a repair gave it too."""
        prefix = f"{self._path}.{layer}."
        return [prefix + name for name in self.layers[layer].state_dict()]

    def _fetch(self, name: str) -> Tensor:
        """A tensor of the model, from its shard to the device."""
        if self.transfer is None:
            return self.shards.read(self._known[name])
        return self.transfer.read(self.shards, self._known[name])

    def _read(self, layer: int) -> dict[str, Tensor]:
        found = {}
        with nullcontext() if self.transfer is None else self.transfer.reading():
            for name in self.names(layer):
                if name in self._known:
                    found[name] = self._fetch(name)
                    check_values(name, found[name])
        return found

    def _arrived(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, which what follows on the device waits for."""
        if self.transfer is not None:
            self.transfer.arrive(list(found.values()))
        return found

    def need(self, layer: int) -> None:
        """Let a layer's weights be on the device, and begin to read the next layer's."""
        waiting, self._ahead = self._ahead, None
        ahead = waiting is not None and waiting[0] == layer
        found = self._arrived(waiting[1].result() if ahead and waiting is not None else self._read(layer))
        for name in self.names(layer):
            module, _, key = name.rpartition(".")
            owner = self.model.get_submodule(module)
            if name not in found:  # given by a repair: zeros, as it gives them
                self._put(owner, key, torch.zeros_like(self.model.get_parameter(name), device=self.device))
            else:
                self._put(owner, key, found[name])
        if layer + 1 < len(self.layers):
            self._ahead = layer + 1, self._reader.submit(self._read, layer + 1)

    @staticmethod
    def _put(owner: nn.Module, key: str, values: Tensor) -> None:
        if key in owner._buffers:
            owner._buffers[key] = values
        else:
            owner._parameters[key] = nn.Parameter(values, requires_grad=False)

    def drop(self, layer: int) -> None:
        """Forget a layer's weights; their shapes stay."""
        for module in self.layers[layer].modules():
            self._forget(module)

    def _forget(self, module: nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    def _front(self, name: str) -> Tensor:
        return self._arrived({name: self._fetch(name)})[name]

    @contextmanager
    def front(self) -> Iterator[None]:
        """Inside, what stands in front of the layers has its weights, and the first layer."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, key))
        inner, outer = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        head = set() if outer is None else {id(p) for p in outer.parameters()} - {id(p) for p in inner.parameters()}
        taken: list[tuple[nn.Module, str, nn.Parameter]] = []
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in self.outside:
            if name not in parameters:
                module, _, key = name.rpartition(".")
                self._put(self.model.get_submodule(module), key, self._front(name))
            elif id(parameters[name]) not in head:
                whole = nn.Parameter(self._front(name), requires_grad=False)
                for module, key in places[id(parameters[name])]:
                    taken.append((module, key, parameters[name]))
                    module._parameters[key] = whole
        self.need(0)
        try:
            yield
        finally:
            self.drop(0)
            for module, key, meta in taken:
                module._parameters[key] = meta

    def copied(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor outside the layers, in pieces, as they are.

        Raises:
            InputError: values that are not finite.
        """
        for piece in self.shards.chunks(self._known[name]):
            check_values(name, piece)
            yield piece

    def planned(self, widths: Sequence[int]) -> list[Planned]:
        """What will be written: first what is outside the layers, then layer by layer, with these widths."""
        found = [self._as_planned(name, self.shards.places[self._known[name]].shape) for name in self.outside]
        for ffn, width in zip(self.described.ffns, widths, strict=True):
            shapes = shapes_at(ffn, width)
            for name in self.names(ffn.block):
                found.append(self._as_planned(name, shapes.get(name)))
        return found

    def _as_planned(self, name: str, shape: tuple[int, ...] | None) -> Planned:
        place = self.shards.places[self._known[name]] if name in self._known else None
        dtype = self.dtype if place is None else DTYPES[place.dtype]
        if shape is None:
            shape = tuple(self.model.get_parameter(name).shape) if place is None else place.shape
        return Planned(name, dtype, shape)


def shapes_at(ffn: FFN, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an FFN's tensors once it is cut to `width` neurons, by name."""
    found = {}
    sides = [(name, blocks * width, "out") for name, blocks in ffn.pattern.inputs] + [(ffn.pattern.down, width, "in")]
    for name, count, side in sides:
        projection = copy.deepcopy(ffn.holder.get_submodule(name)).to("meta")
        narrow(projection, torch.arange(count), side)
        path = f"{ffn.name}.{name}"
        found.update({f"{path}.{key}": tuple(tensor.shape) for key, tensor in projection.state_dict().items()})
    return found
