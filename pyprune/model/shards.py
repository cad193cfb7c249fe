"""Tensors of a checkpoint's safetensors files, read one at a time: the headers alone say where each lies.

They are read into memory of their own, not mapped: so memory is what is held, a reading thread waits for the disk
instead of the one that computes, and a file that shrinks meanwhile is an error, not a signal.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# By the names that safetensors gives them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bytes that are read at once where a tensor is not kept.
CHUNK = 16 << 20


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, which they share."""
    flat: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: as the file calls it, a key of `DTYPES` or another.
        shape: of the tensor.
        start, size: its first byte in the file, and how many.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def _entry(file: Path, name: str, entry: dict[str, Any], begin: int) -> Place:
    first, last = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    size = last - first
    held = DTYPES.get(dtype)
    if min(first, size, *shape, 0) < 0 or (held is not None and size != math.prod(shape) * held.itemsize):
        raise CheckpointError(f"{file.name} has a damaged header: {name} of shape {shape}, {dtype}, in {size} bytes")
    return Place(file, dtype, shape, begin + first, size)


def read_header(file: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file lie; no tensor is read.

    Raises:
        CheckpointError: a damaged header, or a file shorter or longer than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise CheckpointError(f"{file.name} is truncated: its header says {length} bytes, it has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has a damaged header: {error}") from error
    end = max((place.start + place.size for place in found.values()), default=8 + length)
    if size != end:
        raise CheckpointError(f"{file.name} must have {end} bytes; it has {size}")
    return found


def read_index(folder: Path) -> dict[str, str] | None:
    """Which file of a folder each tensor is in, by its index; None where it has none, or one file that is read first.

    Raises:
        CheckpointError: a damaged index, or one that names a file that is not there, or outside the folder.
    """
    path = folder / INDEX
    if not path.is_file() or (folder / WEIGHTS).is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for name, file in named.items():
        if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{INDEX} must name files in its own folder; it puts {name} into {file!r}")
        if not (folder / file).is_file():
            raise CheckpointError(f"{file} is missing from {folder}; {INDEX} puts {name} into it")
    return named


class Shards:
    """The tensors of a checkpoint, by name.

    Args:
        folder: holds `model.safetensors`, or several files and their index.

    Attributes:
        places: where each tensor lies.
        files: the files that hold them, in order.

    Raises:
        CheckpointError: as `read_header` and `read_index`; no such files; or a file without a tensor that the index
            puts into it.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index = read_index(folder)
        if index is None and not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
        self.files = [folder / name for name in (sorted(set(index.values())) if index is not None else [WEIGHTS])]
        headers = {file.name: read_header(file) for file in self.files}
        if index is None:
            self.places = headers[WEIGHTS]
            return
        absent = next(((n, f) for n, f in index.items() if n not in headers[f]), None)
        if absent is not None:
            raise CheckpointError(f"{absent[1]} has no tensor {absent[0]}, which {INDEX} puts into it")
        self.places = {name: headers[file][name] for name, file in index.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places.values())

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: the file has become shorter.
        """
        place = self.places[name]
        raw = torch.empty(place.size, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            self._fill(stream, raw_bytes(raw), name)
        return raw.view(DTYPES[place.dtype]).view(place.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return DTYPES[self.places[name].dtype]

    def chunks(self, name: str, room: Callable[[], Tensor] | None = None) -> Iterator[Tensor]:
        """One tensor's values in order, `CHUNK` bytes at a time.

        Args:
            name: of the tensor.
            room: gives `[CHUNK]` uint8 for each piece; None: each is overwritten by the next.

        Raises:
            CheckpointError: the file has become shorter.
        """
        place = self.places[name]
        own = torch.empty(min(CHUNK, place.size) if room is None else 0, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            left = place.size
            while left:
                raw = own if room is None else room()
                count = self._fill(stream, raw_bytes(raw)[: min(left, len(raw))], name)
                left -= count
                yield raw[:count].view(DTYPES[place.dtype])

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal to the bit."""
        a, b = self.places[one], self.places[other]
        if a == b or (a.dtype, a.shape) != (b.dtype, b.shape):
            return a == b
        pairs = zip(self.chunks(one), self.chunks(other), strict=True)
        return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)

    def _fill(self, stream: Any, view: memoryview, name: str) -> int:
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"{self.places[name].file.name} ended inside {name}: it changed while it was read"
                )
            done += count
        return done

    def identity(self) -> dict[str, str]:
        """What tells, without reading tensors, whether the files are still the same: size, time, and header."""
        found = {}
        for file in self.files:
            facts = file.stat()
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = hashlib.sha256(stream.read(length)).hexdigest()[:16]
            found[file.name] = f"{facts.st_size} bytes, {facts.st_mtime_ns} ns, header {header}"
        return found
