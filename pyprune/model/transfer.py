"""Tensors on their way between files and a device, through a little pinned memory, beside what the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .shards import CHUNK, Shards

# Pieces that are filled from the disk while the one before is copied.
_PIECES = 3


class Transfer:
    """Copies to and from a device, on streams of their own; on a CPU plain copies by the same steps.

    Args:
        device: where tensors are needed. Of a GPU, pieces of `CHUNK` bytes are copied from and to pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._gpu = device, device.type == "cuda"
        self._lock = threading.Lock()
        self._there: Any = torch.cuda.Stream(device) if self._gpu else None
        self._back: Any = torch.cuda.Stream(device) if self._gpu else None
        self._pieces = [self._pinned() for _ in range(_PIECES)]
        self._copied: list[Any] = [None] * _PIECES  # of each, the event after its last copy
        self._next = 0
        self._leaving = self._pinned()

    def _pinned(self) -> Tensor:
        return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._gpu)

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self._gpu else nullcontext()

    def reading(self) -> AbstractContextManager[Any]:
        """Inside, this thread's work on the device is in the order of `read`, not of what is computed."""
        return self._on(self._there)

    def _free_piece(self) -> Tensor:
        """The piece that was copied the longest ago, once that is done."""
        if self._copied[self._next] is not None:
            self._copied[self._next].synchronize()
        return self._pieces[self._next]

    def read(self, shards: Shards, name: str) -> Tensor:
        """A tensor of the shards, on the device; of a GPU perhaps still on its way there (see `arrive`).

        Raises:
            CheckpointError: as `Shards.chunks`.
        """
        place = shards.places[name]
        with self._lock, self.reading():
            values = torch.empty(place.shape, dtype=shards.dtype(name), device=self.device)
            flat, start = values.view(-1), 0
            for piece in shards.chunks(name, self._free_piece):
                flat[start : start + len(piece)].copy_(piece, non_blocking=True)
                start += len(piece)
                if self._gpu:
                    self._copied[self._next] = torch.cuda.Event()
                    self._copied[self._next].record()
                self._next = (self._next + 1) % _PIECES
            return values

    def arrive(self, tensors: list[Tensor]) -> None:
        """Let what this thread does next on the device wait for these, which were `read`."""
        if self._gpu:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._there)
            for tensor in tensors:
                tensor.record_stream(now)  # its memory is not given to the next layer before this one is done with it

    def mark(self) -> Any:
        """A point in what this thread did on the device, for `leave` in another thread."""
        return torch.cuda.current_stream(self.device).record_event() if self._gpu else None

    def leave(self, values: Tensor, after: Any) -> Iterator[Tensor]:
        """The values of a tensor on the device, in order, in pieces in main memory; each is overwritten by the next.

        Args:
            values: the tensor.
            after: the point, as `mark` gives it, at which they are computed.
        """
        with self._on(self._back):
            if after is not None:
                after.wait()
            flat = values.reshape(-1)
        step = CHUNK // values.dtype.itemsize
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            room = self._leaving[: piece.nbytes].view(values.dtype)
            with self._on(self._back):
                room.copy_(piece)
            yield room
