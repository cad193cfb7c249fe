"""Safetensors files written tensor by tensor, in an order and of shapes that are known before; resumable."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.errors import CheckpointError
from .shards import CHUNK, DTYPES, INDEX, WEIGHTS, raw_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes from which a thread of its own is worth while to hash them.
_LARGE = 1 << 18
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: of the tensor.
        dtype, shape: of its values.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_bytes(size: int | str) -> int:
    """A size that `checkpoint.check_out` takes, as a number of bytes."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", size.strip(), re.IGNORECASE)
    assert found is not None
    return int(float(found[1]) * _UNITS[found[2].upper()])


def split(tensors: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """Tensors in files of `limit` bytes at most, in order; one that is larger has a file of its own."""
    files: list[list[Planned]] = []
    held = 0
    for tensor in tensors:
        # Values lie at multiples of their own size, so that readers may map them.
        if not files or held + tensor.size > limit or held % tensor.dtype.itemsize:
            files.append([])
            held = 0
        files[-1].append(tensor)
        held += tensor.size
    return files


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        shape, end = list(tensor.shape), start + tensor.size
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """The weights of a checkpoint, written one tensor after the other.

    Args:
        folder: of the files, which are named as Transformers names them; it exists.
        tensors: in the order in which they will come.
        limit: bytes of tensors in a file at most.
        done: how many of them an earlier process wrote.
        hashes: SHA-256 of the files that it finished.

    Attributes:
        done: tensors written.
        hashes: by finished file.

    Raises:
        CheckpointError: what the earlier process wrote is not there.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Planned],
        limit: int,
        done: int = 0,
        hashes: dict[str, str] | None = None,
    ) -> None:
        self._folder, self._tensors = folder, list(tensors)
        files = split(tensors, limit)
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        self._files = dict(zip(names if len(files) > 1 else [WEIGHTS], files, strict=True))
        self._place = [(name, i) for name, file in self._files.items() for i in range(len(file))]
        self.done, self.hashes = done, dict(hashes or {})
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, "hashing a shard")
        for file in self.hashes:
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file} was written and is gone: remove {folder.parent} to start anew")

    def write(self, name: str, values: Iterable[Tensor]) -> None:
        """Write the next tensor.

        Args:
            name: of the next one planned.
            values: its values in order, in any pieces.

        Raises:
            OSError: the disk is full, or not writable.
        """
        planned = self._tensors[self.done]
        file, number = self._place[self.done]
        assert name == planned.name, f"{planned.name} comes next, not {name}"
        if self._stream is None:
            self._open(file, number)
        assert self._stream is not None
        size = 0
        for piece in values:
            assert piece.dtype == planned.dtype
            raw = raw_bytes(piece.contiguous())
            self._all(raw)
            size += len(raw)
        assert size == planned.size, f"{name} has {size} bytes, {planned.size} were planned"
        self.done += 1
        if number + 1 == len(self._files[file]):
            self.flush()
            self._stream.close()
            self._stream = None
            self.hashes[file] = self._digest.hexdigest()

    def _open(self, file: str, number: int) -> None:
        """Open the file of the next tensor, behind those that are in it."""
        path, header = self._folder / file, _header(self._files[file])
        self._digest = hashlib.sha256()
        if number == 0:
            self._stream = path.open("wb", buffering=0)
            self._all(header)
            return
        end = len(header) + sum(tensor.size for tensor in self._files[file][:number])
        if not path.is_file() or path.stat().st_size < end:
            raise CheckpointError(f"{path} lacks what was written: remove {self._folder.parent} to start anew")
        self._stream = path.open("r+b", buffering=0)
        while (place := self._stream.tell()) < end:
            self._digest.update(self._stream.read(min(CHUNK, end - place)))
        self._stream.truncate(end)

    def _all(self, raw: bytes | memoryview) -> None:
        """Write all of `raw`, and hash it meanwhile: afterwards the caller may use its memory again."""
        assert self._stream is not None
        job = self._hashing.submit(self._digest.update, raw) if len(raw) >= _LARGE else None
        try:
            rest = memoryview(raw)
            while len(rest):
                rest = rest[self._stream.write(rest) :]  # a file without a buffer may take less
        finally:
            if job is not None:
                job.result()
        if job is None:
            self._digest.update(raw)

    def flush(self) -> None:
        """Let what was written be on the disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file under way, wherever it is."""
        self._hashing.shutdown()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(self) -> None:
        """Write the index, where there are several files, after the last tensor."""
        assert self.done == len(self._tensors) and self._stream is None
        if len(self._files) == 1:
            return
        total = sum(tensor.size for tensor in self._tensors)
        parameters = sum(math.prod(tensor.shape) for tensor in self._tensors)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": {tensor.name: file for file, tensors in self._files.items() for tensor in tensors},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
