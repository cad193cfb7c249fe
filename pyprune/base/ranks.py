"""Several processes that do one piece of work together, over `torch.distributed` as launcher or caller set it up.

Every rank runs the same program; what they share are sums and results. Before anything is exchanged the ranks tell each
other that they are at the same place and well, so an error of one is an error of all, and nobody waits for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .errors import InputError, PypruneError, check, one_line

T = TypeVar("T")
_WORDS = 2048  # bytes of what a rank says of its error


class Ranks:
    """All processes of the default group, or this one alone.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._told = False  # all ranks know of an error, or cannot be told
        self._devices = "" if size == 1 else str(dist.get_backend_config())

    @classmethod
    def joined(cls, together: bool = True) -> Ranks:
        """All of the default group, where there is one; this process alone where `together` is False.

        Raises:
            InputError: a launcher started several processes, and nobody has made a group of them.
        """
        if not together:
            return ALONE
        if dist.is_available() and dist.is_initialized():
            return ALONE if dist.get_world_size() == 1 else cls(dist.get_rank(), dist.get_world_size())
        world = os.environ.get("WORLD_SIZE", "1")
        rule = "be initialised (init_process_group) where WORLD_SIZE names several processes, or together be False"
        check(world in ("", "0", "1"), "torch.distributed", rule, f"WORLD_SIZE={world}")
        return ALONE

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, an error of one rank becomes one of every rank: at the next exchange, or at the end.

        Raises:
            PypruneError: another rank's error, of its kind, with its number in front.
        """
        try:
            yield
            self._meet("end")
        except Exception as error:
            if not self._told:
                self._told = True
                self._tell({"kind": type(error).__name__, "message": one_line(error, 1500)})
            raise

    def _place(self) -> torch.device:
        """Where small tensors must lie for the group's backend."""
        return torch.device("cpu" if "cpu:" in self._devices else "cuda")

    def _all(self, numbers: list[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._place())
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [row.tolist() for row in every]

    def _meet(self, what: str, size: int = 0, failed: bool = False) -> None:
        """Let all ranks know that this one has come to `what`, and is well; raise what another one has to say."""
        if self.size == 1:
            return
        here = zlib.crc32(what.encode())
        try:
            rows = self._all([int(failed), here, size])
        except Exception:
            self._told = True  # a rank is gone
            raise
        if any(row[0] for row in rows):
            self._told = True
            self._raise(self._said(None))
        if any(row != [0, here, size] for row in rows):
            self._told = True
            raise PypruneError(f"ranks came to different places ({what}): every rank must call the same, in one order")

    def _tell(self, error: dict[str, str]) -> None:
        """Let the others know of this rank's error."""
        if self.size == 1:
            return
        try:
            self._all([1, 0, 0])
            self._said(error)
        except Exception:  # they are gone, and will not ask; this rank's own error is what counts
            return

    def _said(self, mine: dict[str, str] | None) -> dict[int, dict[str, str]]:
        """What ranks with an error say of it."""
        text = b"" if mine is None else json.dumps(mine).encode()[:_WORDS]
        row = torch.zeros(_WORDS, dtype=torch.uint8, device=self._place())
        row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        every = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(every, row)
        found = {i: bytes(r.tolist()).rstrip(b"\0") for i, r in enumerate(every)}
        return {i: json.loads(words) for i, words in found.items() if words}

    def _raise(self, said: dict[int, dict[str, str]]) -> None:
        rank, error = min(said.items())
        kind = getattr(errors, error["kind"], None)
        known = isinstance(kind, type) and issubclass(kind, PypruneError)
        name = "" if known else f"{error['kind']}: "
        raise (kind if known else PypruneError)(f"rank {rank}: {name}{error['message']}")  # type: ignore[misc]

    # What ranks exchange.

    @torch.no_grad()
    def add(self, *tensors: Tensor) -> None:
        """Sum each tensor over the ranks, in place; every rank gets the same bits."""
        if self.size == 1:
            return
        self._meet("add", sum(t.numel() for t in tensors))
        for tensor in tensors:
            moved = self._movable(tensor)
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)

    def _movable(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous and where the backend can take it."""
        fits = f"{tensor.device.type}:" in self._devices
        return (tensor if fits else tensor.to(self._place())).contiguous()

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._place())
        self._meet("gather")
        lengths = [row[0] for row in self._all([len(text)])]
        padded = text.new_zeros(max(lengths))
        padded[: len(text)] = text
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(every, lengths, strict=True)]

    def exchange(self, mine: Mapping[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The named tensors of all ranks, on `device`; of a name that several have, the last rank's."""
        if self.size == 1:
            return {name: tensor.to(device) for name, tensor in mine.items()}
        given = {name: tensor.detach().to(device).contiguous() for name, tensor in mine.items()}
        facts = [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in given.items()]
        found: dict[str, Tensor] = {}
        for rank, described in enumerate(self.gather(facts)):
            for name, kind, shape in described:
                tensor = (
                    given[name] if rank == self.rank else torch.empty(shape, dtype=getattr(torch, kind), device=device)
                )
                found[name] = tensor
                if tensor.numel():
                    flat = tensor.view(-1).view(torch.uint8)
                    moved = self._movable(flat)
                    dist.broadcast(moved, src=rank)
                    if moved is not flat and rank != self.rank:
                        flat.copy_(moved)
        return found

    def first(self, make: Callable[[], T], pack: Callable[[T], tuple[dict[str, Tensor], Any]], unpack: Any) -> T:
        """What `make` gives on the first rank, on every one: the others wait.

        Args:
            make: called by the first rank alone.
            pack: what is made as tensors and a JSON value.
            unpack: and back.
        """
        if self.size == 1:
            return make()
        tensors, facts = pack(make()) if self.rank == 0 else ({}, None)
        facts = self.gather(facts)[0]
        made: T = unpack(self.exchange(tensors), facts)
        return made

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `InputError`, on every rank, naming those of `facts` (JSON values) in which the ranks differ."""
        if self.size == 1:
            return
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
        short = {n: t if len(t) <= 80 else hashlib.sha256(t.encode()).hexdigest()[:12] for n, t in texts.items()}
        rows = self.gather(short)
        names = list(dict.fromkeys(name for row in rows for name in row))
        differing = []
        for name in names:
            values: dict[str, list[int]] = {}
            for rank, row in enumerate(rows):
                values.setdefault(row.get(name, "nothing"), []).append(rank)
            if len(values) > 1:
                said = ", ".join(f"{value} on rank {' '.join(map(str, on[:4]))}" for value, on in values.items())
                differing.append(f"{name} ({said})")
        if differing:
            self._told = True  # every rank raises it by itself
            raise InputError(f"ranks must be given the same; they differ in {'; '.join(differing)}")

    def check_enough(self, count: int, argument: str, what: str) -> None:
        """Raise `InputError` where there are fewer things to share out than ranks."""
        check(count >= self.size, argument, f"hold {what} for each of {self.size} processes", count)


ALONE = Ranks()


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
