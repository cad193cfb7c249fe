"""The GGUF file of a dense model, from which an export takes everything but the FFNs; whether it belongs to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError, InputError, UnsupportedModelError, check, one_line
from ..model import provenance

CONVERTER = "convert_hf_to_gguf.py of llama.cpp"
_SAMPLE = 64  # rows of a tensor that are compared
# How far the values of a base may lie from the model's, root mean square over root mean square, by the bits of a
# weight; another model's lie 1.4 apart. Floats: a rounding to bfloat16.
_FLOATS = ("F32", "F16", "BF16")
_ROUNDED = 2.0**-8
_APART = {8: 0.02, 6: 0.05, 5: 0.15, 4: 0.2, 3: 0.35}


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


def dequantise(tensor: Any, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Rows of a tensor of a GGUF file, in float32."""
    values: np.ndarray = package().quants.dequantize(np.ascontiguousarray(tensor.data[rows]), tensor.tensor_type)
    return values


def heads_apart(rows: int, heads: int) -> np.ndarray:
    """Which row of a query or key projection of Transformers stands in each row of one of llama.cpp's LLaMA.

    Transformers turns entry i of a head with entry i + half of it, llama.cpp's LLaMA two neighbours.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


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

    def heads(self, name: str) -> int:
        """How many heads of attention the query or key projection `name` has."""
        key = "head_count_kv" if ".attn_k." in name else "head_count"
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
            UnsupportedModelError: an architecture whose tensors cannot be told.
        """
        config: Any = model.config
        other = f"base must be the dense model of this checkpoint; in {self.path.name}"
        if self.layers != config.num_hidden_layers:
            raise InputError(f"{other} there are {self.layers} layers, in the checkpoint {config.num_hidden_layers}")
        compared = 0
        trained = bool(provenance.read(config).get("recovery"))
        for name, tensor, theirs in self._pairs(model):
            if not (limit := _limit(theirs.tensor_type, trained)):
                continue
            shape = tuple(int(n) for n in reversed(theirs.shape))
            if shape not in (tuple(tensor.shape), tuple(tensor.shape)[::-1]):
                raise InputError(f"{other} {name} is {list(shape)}, in the checkpoint {list(tensor.shape)}")
            try:
                apart = self._apart(name, tensor, theirs)
            except NotImplementedError:  # a type that the package gguf cannot read
                continue
            if apart > limit:
                hint = (
                    f"; where training changed more than FFNs, make a base from the checkpoint itself: "
                    f"export --to padded, then {CONVERTER}"
                )
                kind = theirs.tensor_type.name
                raise InputError(
                    f"{other} {name} ({kind}) lies {apart:.3g} from the checkpoint's, {limit:.3g} at most{hint}"
                )
            compared += 1
        if compared < self.layers:
            raise UnsupportedModelError(
                f"only {compared} tensors of {self.path.name} ({self.arch}) could be told to be this checkpoint's, "
                f"too few for {self.layers} layers"
            )
        return compared

    def _apart(self, name: str, tensor: Tensor, theirs: Any) -> float:
        """Distance of a file's tensor from the model's over the model's size, under the layout that fits best."""
        count = theirs.data.shape[0]
        rows = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int)) if theirs.data.ndim > 1 else np.arange(count)
        found = dequantise(theirs, rows).astype(np.float64)
        layouts = []
        if tensor.shape[0] == count:
            layouts.append(_rows(tensor, rows))
            if tensor.ndim == 1:
                layouts.append(layouts[0] + 1)  # Gemma's norms
            if ".attn_q." in name or ".attn_k." in name:
                layouts.append(_rows(tensor, heads_apart(count, self.heads(name))[rows]))
        if tensor.ndim == 2 and tensor.shape[1] == count:
            layouts.append(_rows(tensor.t(), rows))  # GPT-2's projections
        fitting = [wanted for wanted in layouts if wanted.shape == found.shape]
        return float(min(np.sqrt(((found - w) ** 2).sum() / max((w**2).sum(), 1e-30)) for w in fitting))


def _rows(tensor: Tensor, which: np.ndarray) -> np.ndarray:
    values: np.ndarray = tensor.detach().cpu()[torch.from_numpy(which)].to(torch.float64).numpy()
    return values


def _limit(kind: Any, trained: bool) -> float:
    """How far values of this type may lie from the model's; 0 where any distance could be."""
    if kind.name in _FLOATS or trained:  # after training, only a base with the very values tells
        return _ROUNDED
    block, size = package().GGML_QUANT_SIZES[kind]
    return next((limit for bits, limit in _APART.items() if size * 8 / block >= bits), 0.0)
