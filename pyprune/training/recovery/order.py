"""Which windows a step trains on."""

from __future__ import annotations

import torch
from torch import Tensor


def order(count: int, epoch: int, seed: int) -> Tensor:
    """The windows of one pass, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def rows(step: int, count: int, batch: int, seed: int) -> Tensor:
    """`[batch]`: windows of a step; passes follow each other without a gap, and only the step's number matters."""
    places = torch.arange(step * batch, (step + 1) * batch)
    orders = {epoch: order(count, epoch, seed) for epoch in set((places // count).tolist())}
    return torch.stack([orders[int(p) // count][int(p) % count] for p in places])
