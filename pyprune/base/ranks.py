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
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .errors import InputError, PypruneError, check, one_line

T = TypeVar("T")
_WORDS = 2048  # bytes of what a rank says of its error


class _Now:
    """Of the work at hand in this process: how many `working` are inside one another, and whether all ranks know of an
    error already, or cannot be told.
    """

    depth = 0
    told = False


_now = _Now()


class Ranks:
    """All processes of the default group, or this one alone.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
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
        if self.size == 1:
            yield
            return
        if _now.depth == 0:
            _now.told = False
        _now.depth += 1
        try:
            yield
            self._meet("end")
        except Exception as error:
            if not _now.told:
                _now.told = True
                self._tell(f"{type(error).__name__} {one_line(error, 1500)}")
            raise
        finally:
            _now.depth -= 1

    def _place(self) -> torch.device:
        """Where small tensors must lie for the group's backend."""
        return torch.device("cpu" if "cpu:" in self._devices else "cuda")

    def _all(self, numbers: list[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._place())
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [row.tolist() for row in every]

    def _meet(self, what: str, size: int = 0) -> None:
        """Let all ranks know that this one has come to `what`, and is well; raise what another one has to say."""
        if self.size == 1:
            return
        here = zlib.crc32(what.encode())
        try:
            rows = self._all([0, here, size])
        except Exception:
            _now.told = True  # a rank is gone
            raise
        if any(row[0] for row in rows):
            _now.told = True
            self._raise(self._said(""))
        if any(row != [0, here, size] for row in rows):
            _now.told = True
            raise PypruneError(f"ranks came to different places ({what}): every rank must call the same, in one order")

    def _tell(self, error: str) -> None:
        """Let the others know of this rank's error."""
        try:
            self._all([1, 0, 0])
            self._said(error)
        except Exception:  # they are gone, and will not ask; this rank's own error is what counts
            return

    def _said(self, mine: str) -> dict[int, str]:
        """What ranks with an error say of it."""
        text = mine.encode()[:_WORDS]
        row = torch.zeros(_WORDS, dtype=torch.uint8, device=self._place())
        row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        every = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(every, row)
        found = {i: bytes(r.tolist()).rstrip(b"\0").decode(errors="ignore") for i, r in enumerate(every)}
        return {i: words for i, words in found.items() if words}

    def _raise(self, said: dict[int, str]) -> None:
        rank, words = min(said.items())
        name, _, message = words.partition(" ")
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, PypruneError):
            raise kind(f"rank {rank}: {message}")
        raise PypruneError(f"rank {rank}: {name}: {message}")

    def share(self, items: Tensor) -> Tensor:
        """This rank's part of the rows of a tensor, which follow each other; parts differ by one row at most."""
        return items.tensor_split(self.size)[self.rank]

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
            _now.told = True  # every rank raises it by itself
            raise InputError(f"ranks must be given the same; they differ in {'; '.join(differing)}")

    def check_enough(self, count: int, argument: str, what: str) -> None:
        """Raise `InputError` where there are fewer things to share out than ranks."""
        check(count >= self.size, argument, f"hold {what} for each of {self.size} processes", count)


ALONE = Ranks()


def leads() -> bool:
    """Whether this process is the one that writes and prints: the first of its group, or alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _number(name: str, default: str = "") -> int:
    value = os.environ.get(name, "") or default
    rule = "be a number where WORLD_SIZE is above 1: start with `torchrun --nproc-per-node N -m pyprune ...`"
    check(value.isdigit(), name, rule, value)
    return int(value)


def launched() -> int:
    """How many processes a launcher (torchrun) says that it started."""
    return _number("WORLD_SIZE", "1") or 1


def check_devices(device: str, processes: int) -> None:
    """Raise `InputError` unless so many processes of one group can each have such a device on this machine.

    That is: a device with a number, fewer GPUs than processes, or torch without NCCL or gloo.
    """
    check(dist.is_available() and dist.is_gloo_available(), "torch", "have torch.distributed with gloo", "one without")
    if not device.startswith("cuda"):
        return
    check(device == "cuda", "device", "be cuda, for every process takes the GPU of its number, or cpu", device)
    count, rule = (
        torch.cuda.device_count(),
        f"be cpu where {processes} processes do not have a GPU each on this machine",
    )
    check(count >= processes, "device", rule, f"cuda, of which there are {count}")
    check(dist.is_nccl_available(), "device", "be cpu where torch has no NCCL", "cuda")


def local_device(device: str) -> str:
    """The device of this process among those that a launcher started: `cpu`, or `cuda` with a number of its own.

    Raises:
        InputError: as `check_devices`.
    """
    if launched() == 1:
        return device
    check_devices(device, _number("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return device if device == "cpu" else f"cuda:{_number('LOCAL_RANK')}"


@contextmanager
def joining(device: str) -> Iterator[Ranks]:
    """Inside, the processes that a launcher started are one group.

    Args:
        device: what `local_device` gave.

    Raises:
        whatever is raised inside, on every rank; with `told` where the first rank has said it.
    """
    for name in ("RANK", "MASTER_PORT"):
        _number(name)
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    # Rank 0 may write for long while others wait. A process that dies is noticed, and the launcher ends the others.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    ranks = Ranks.joined()
    try:
        with ranks.working():
            yield ranks
    except Exception as error:
        error.told = ranks.rank > 0  # type: ignore[attr-defined]  # the first rank knows of it, and says it
        raise
    finally:
        dist.destroy_process_group()
