"""The GGUF file of a dense model, from which an export takes everything but the FFNs; whether it belongs to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError, InputError, UnsupportedModelError, check, one_line
from ..model import provenance

CONVERTER = "convert_hf_to_gguf.py of llama.cpp"
_SAMPLE = 64  # rows of a tensor that are compared
# Types of which a tensor must be the model's, cast.
_FLOATS = ("F32", "F16", "BF16")
# Rounding to the nearest of equal steps leaves a root mean square of 12**-0.5 of a step, and whatever rounded before
# (a checkpoint in another type, the scale of a block) little more. Q8_0 has always been rounded so.
_STEPS = 1.1 * 12**-0.5
# The other types' roundings differ by who made the file: how far their values may lie from the model's, root mean
# square over root mean square, by the bits of a weight; another model's lie 1.4 apart.
_APART = {8: 0.02, 6: 0.05, 5: 0.15, 4: 0.2, 3: 0.35}
# A file and a checkpoint of two 16-bit types; of their values so many are the same in bfloat16 (15 of 16, about).
_SIXTEEN = ({"F16", torch.bfloat16}, {"BF16", torch.float16})
_SAME = 0.9
_FAR = 0.5  # further than this, it is not training that changed the values
# Of the values found and wanted, how far each may be off, the type and the checkpoint's: whether they are the same.
Told = Callable[[np.ndarray, np.ndarray, Any, Any, torch.dtype], bool]


def package() -> Any:
    """The package `gguf`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise InputError("GGUF files need the package gguf: pip install 'pyprune[gguf]'") from error
    return gguf


def dequantise(tensor: Any) -> np.ndarray:
    """A tensor of a GGUF file, in float32."""
    values: np.ndarray = package().quants.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
    return values


def heads_apart(rows: int, heads: int) -> np.ndarray:
    """Which row of a query or key projection of Transformers stands in each row of one of llama.cpp's LLaMA.

    Transformers turns entry i of a head with entry i + half of it, llama.cpp's LLaMA two neighbours.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def heads_grouped(rows: int, heads: int, kv_heads: int) -> np.ndarray:
    """Which row of a projection to queries, keys and values together stands in each row of llama.cpp's.

    In Transformers' GPT-NeoX, BLOOM and Falcon each group of queries is followed by its key and its value; in llama.cpp
    all queries come first, then all keys, then all values.
    """
    groups = np.arange(rows).reshape(kv_heads, heads // kv_heads + 2, -1)
    return np.concatenate([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])


class Base:
    """A GGUF file of a dense model.

    Args:
        path: the file.

    Attributes:
        arch: its architecture as llama.cpp names it.
        layers: number of its decoder layers.
        tensors: by name; `data` is mapped, not read.

    Raises:
        InputError: no such file, a part of several, or the package `gguf` is not installed.
        CheckpointError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check(self.path.is_file(), "base", "be a GGUF file", str(path))
        try:
            self.reader = package().GGUFReader(self.path)
            self.arch = str(self.value("general.architecture"))
            self.layers = int(self.value(f"{self.arch}.block_count"))
        except InputError:
            raise
        except Exception as error:  # whatever the reader makes of a damaged file
            raise CheckpointError(f"base {str(path)!r} cannot be read as GGUF: {one_line(error)}") from error
        whole = self.value("split.count", 1) in (0, 1)
        check(whole, "base", "be one file (join its parts by llama-gguf-split)", str(path))
        check(self.reader.byte_order == "I", "base", "have this machine's byte order", str(path))
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self.reader.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of its metadata."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def heads(self, name: str, kind: str | None = None) -> int:
        """How many heads of attention a projection has.

        Args:
            name: of the projection, as `blk.3.attn_k.weight`.
            kind: `head_count` or `head_count_kv`; None for what `name` is.
        """
        key = kind or ("head_count_kv" if ".attn_k." in name else "head_count")
        every = self.value(f"{self.arch}.attention.head_count")
        value = self.value(f"{self.arch}.attention.{key}", every)
        return int(value[int(name.split(".")[1])] if isinstance(value, list) else value)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
        """Tensors of a model outside its FFNs, each with that of this file: its name, its values, the file's."""
        gguf = package()
        arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}.get(self.arch)
        if arch is None:
            raise UnsupportedModelError(
                f"base has architecture {self.arch!r}, of which the package gguf knows no names"
            )
        names = gguf.get_tensor_name_map(arch, self.layers)
        for key, tensor in model.state_dict().items():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name in self.tensors and not any(f".ffn_{part}." in name for part in ("gate", "up", "down")):
                yield name, tensor, self.tensors[name]

    def check_belongs(self, model: nn.Module) -> int:
        """Compare a sample of every tensor outside the FFNs with the model's.

        Returns:
            How many tensors were compared.

        Raises:
            InputError: another model's: other layers, other shapes, or other values than this type can explain.
            UnsupportedModelError: an architecture whose tensors cannot be told, or a tensor of another form.
        """
        config: Any = model.config
        other = f"base must be the dense model of this checkpoint; in {self.path.name}"
        if self.layers != config.num_hidden_layers:
            raise InputError(f"{other} there are {self.layers} layers, in the checkpoint {config.num_hidden_layers}")
        facts = provenance.read(config)
        trained = bool(facts.get("recovery") or "training" in (facts.get("provenance") or {}))
        compared = 0
        for name, tensor, theirs in self._pairs(model):
            kind = theirs.tensor_type
            told = _as_values if trained else _told_by(kind)
            if told is None:
                continue
            shape = tuple(int(n) for n in reversed(theirs.shape))
            if np.prod(shape) != tensor.numel():
                raise InputError(f"{other} {name} is {list(shape)}, in the checkpoint {list(tensor.shape)}")
            form, ours = _form(shape), _form(tensor.shape)
            if form not in (ours, ours[::-1]):
                raise UnsupportedModelError(
                    f"whether {name} of {self.path.name}, {list(shape)}, is the checkpoint's cannot be told: there it "
                    f"is {list(tensor.shape)}"
                )
            try:
                apart = self._apart(name, tensor.reshape(ours), theirs, form, told)
            except NotImplementedError:  # a type that the package gguf cannot read
                continue
            if apart is not None:
                why = f"further than {kind.name} rounds, so training changed it"
                if apart >= _FAR:
                    why = "it is another model's, or in an order that is not known"
                elif trained and kind.name not in _FLOATS:
                    why = "after training only the very values tell that it is unchanged"
                raise InputError(
                    f"{other} {name} ({kind.name}) lies {apart:.3g} from the checkpoint's: {why}; make a base from the "
                    f"checkpoint itself by export --to padded, then {CONVERTER}"
                )
            compared += 1
        if compared < self.layers:
            raise UnsupportedModelError(
                f"only {compared} tensors of {self.path.name} ({self.arch}) could be told to be this checkpoint's, "
                f"too few for {self.layers} layers"
            )
        return compared

    def _apart(self, name: str, tensor: Tensor, theirs: Any, form: tuple[int, ...], told: Told) -> float | None:
        """None where a file's tensor is the model's, rounded, in a known order; else its distance from the nearest.

        Args:
            name: of the file's tensor.
            tensor: the model's.
            theirs: the file's.
            form: its sides.
            told: whether values are the model's, rounded.

        Raises:
            NotImplementedError: a type that the package gguf cannot read.
        """
        data = theirs.data.reshape(*form[:-1], -1)
        rows = np.arange(form[0])
        if len(form) > 1:
            rows = np.unique(np.linspace(0, form[0] - 1, _SAMPLE).astype(int))
            data = data[rows]
        kind = theirs.tensor_type
        found = package().quants.dequantize(np.ascontiguousarray(data), kind).astype(np.float64)
        nearest = float("inf")
        for wanted, slack in self._orders(name, tensor, rows, form):
            if told(found, wanted, slack, kind, tensor.dtype):
                return None
            nearest = min(nearest, _distance(found, wanted))
        return nearest

    def _orders(
        self, name: str, tensor: Tensor, rows: np.ndarray, form: tuple[int, ...]
    ) -> Iterator[tuple[np.ndarray, np.ndarray | float]]:
        """What rows of the model's tensor a converter may have written as these, and how far each may be off."""
        count = form[0]
        if tuple(tensor.shape) == form:
            wanted = _rows(tensor, rows)
            yield wanted, 0.0
            if tensor.ndim == 1:  # norms of Gemma and Nemotron, which the model keeps less 1: both roundings
                less = torch.finfo(tensor.dtype).eps * np.abs(wanted)
                yield wanted + 1, less + np.spacing(np.abs(wanted + 1).astype(np.float32))
            if ".attn_q." in name or ".attn_k." in name:
                yield _rows(tensor, heads_apart(count, self.heads(name))[rows]), 0.0
            if ".attn_qkv." in name:
                heads, kv_heads = (self.heads(name, kind) for kind in ("head_count", "head_count_kv"))
                if kv_heads and heads % kv_heads == 0 and count % (heads + 2 * kv_heads) == 0:
                    yield _rows(tensor, heads_grouped(count, heads, kv_heads)[rows]), 0.0
        if tensor.ndim == 2 and tensor.shape[1] == count:
            yield _rows(tensor.t(), rows), 0.0  # GPT-2's projections


def _rows(tensor: Tensor, which: np.ndarray) -> np.ndarray:
    values: np.ndarray = tensor.detach()[torch.from_numpy(which).to(tensor.device)].to("cpu", torch.float64).numpy()
    return values


def _form(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its sides of 1, which converters drop."""
    return tuple(int(n) for n in shape if n != 1) or (1,)


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((found - wanted) ** 2).sum() / max((wanted**2).sum(), 1e-30)))


def _told_by(kind: Any) -> Told | None:
    """What tells whether values of this type are the model's, rounded; None where any values could be."""
    if kind.name in _FLOATS:
        return _as_values
    if kind.name == "Q8_0":
        return _by_steps
    block, size = package().GGML_QUANT_SIZES[kind]
    limit = next((limit for bits, limit in _APART.items() if size * 8 / block >= bits), None)
    return None if limit is None else lambda found, wanted, *_: _distance(found, wanted) <= limit


def _as_values(found: np.ndarray, wanted: np.ndarray, slack: Any, kind: Any, dtype: torch.dtype) -> bool:
    """Whether one is the other, cast to its type: the file may be the coarser of the two, or the checkpoint."""
    if (np.abs(found - wanted) <= slack).all():
        return True
    if torch.equal(torch.from_numpy(found).to(dtype), torch.from_numpy(wanted).to(dtype)):
        return True
    if kind.name not in _FLOATS:
        return False
    quants = package().quants
    with np.errstate(over="ignore"):
        cast = quants.quantize(np.ascontiguousarray(wanted, np.float32), kind)
    if np.array_equal(quants.dequantize(cast, kind), found):
        return True
    return {kind.name, dtype} in _SIXTEEN and _of_one_master(found, wanted)


def _of_one_master(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether values in float16 and values in bfloat16 are roundings of the same: what float16 puts midway between two
    of bfloat16, an eighth of all, bfloat16 may have rounded the other way.
    """
    a, b = (torch.from_numpy(values).to(torch.bfloat16).double().numpy() for values in (found, wanted))
    near = np.abs(found - wanted) <= 2.0**-7 * np.abs(wanted) + 2.0**-24
    return bool(near.all() and (a == b).mean() >= _SAME)


def _by_steps(found: np.ndarray, wanted: np.ndarray, *_: Any) -> bool:
    """Whether values are others, rounded to 127 steps on either side of 0 in each block of 32."""
    steps = np.abs(found).reshape(-1, 32).max(1) / 127
    return bool(((found - wanted) ** 2).mean() <= _STEPS**2 * (steps**2).mean())
