"""Weights that are cut over processes (FSDP2), put together in another model."""

from __future__ import annotations

import torch
from torch import nn

from ..base.errors import check
from ..base.ranks import Ranks
from ..model.weights import is_sharded, whole


def check_into(model: nn.Module, into: nn.Module | None, ranks: Ranks) -> None:
    """Raise `InputError`, on every process, unless `gather` can put `model` together in `into`.

    `into` must be None where this process has the whole model; where it is cut, a whole model with the same
    parameters on the first process (others may give None).
    """
    with ranks.working():
        if not is_sharded(model):
            check(into is None, "into", "be left out where this process has the whole model", type(into).__name__)
        elif ranks.rank == 0:
            check(into is not None, "into", "be a whole model of the same config where weights are cut (FSDP2)", None)
            assert into is not None
            mine, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, into))
            strange = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            check(not strange, "into", "have the parameters of the trained model", strange[:3])


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module | None, ranks: Ranks) -> None:
    """Copy the weights of `model`, which are cut over the ranks, into the first one's whole model."""
    own = dict(into.state_dict(keep_vars=True)) if into is not None and ranks.rank == 0 else {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        full = whole(tensor)
        if name in own:
            own[name].copy_(full)
