"""Text -> strings of bytes: one half to train on, the other to measure on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyprune.base.errors import check
from pyprune.base.text import DEFAULT_TEXT, default_text, halves, plain_text, read_documents


def byte_ids(text: str) -> Tensor:
    """`[N]` int64, the bytes of `text` in UTF-8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.zeros(0).long()


@dataclass(frozen=True, eq=False)
class Data:
    """The bytes to train on, and the strings to measure on.

    Attributes:
        train: `[N]` int64.
        held_out: `[S, length]` int64, spread evenly over the other half of the text, without overlap.
        name: of the text, for reports.
    """

    train: Tensor
    held_out: Tensor
    name: str


def load(path: Path | None, length: int, strings: int) -> Data:
    """Cut a text into two halves at a paragraph break.

    Args:
        path: UTF-8 text or .jsonl; None for prose that CPython carries.
        length: bytes of a string.
        strings: how many to measure on, at most.

    Raises:
        InputError: no such file, or a half of the text shorter than one string.
    """
    check(length >= 2, "length", "be at least 2 bytes", length)
    check(strings >= 2, "strings", "be at least 2", strings)
    if path is None:
        first, second = halves(default_text())
        name = DEFAULT_TEXT
    else:
        first, second = halves(plain_text(read_documents(path)))
        name = path.name
    train, rest = byte_ids(first), byte_ids(second)
    for half, ids in (("first", train), ("second", rest)):
        check(len(ids) > length, "text", f"have more than {length} bytes in its {half} half", len(ids))
    all_strings = rest[: len(rest) // length * length].view(-1, length)
    chosen = torch.linspace(0, len(all_strings) - 1, min(strings, len(all_strings))).round().long()
    return Data(train, all_strings[chosen], name)


@dataclass(frozen=True)
class Batches:
    """Strings from random places of a text, each batch with the weight of the KL at its step; the same at every pass.

    Attributes:
        ids: `[N]`, the text.
        length: bytes of a string.
        batch: strings of a batch.
        steps: batches of a pass.
        seed: of the places.
        first: steps taken before.
        annealing: steps over which the weight of the KL rises from 0 to 1; 0 for 1 from the start.
    """

    ids: Tensor
    length: int
    batch: int
    steps: int
    seed: int
    first: int = 0
    annealing: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        generator = torch.Generator().manual_seed(self.seed)
        strings = self.ids.unfold(0, self.length, 1)
        for step in range(self.first, self.first + self.steps):
            weight = min(1.0, step / self.annealing) if self.annealing else 1.0
            yield strings[torch.randint(len(strings), (self.batch,), generator=generator)], weight
