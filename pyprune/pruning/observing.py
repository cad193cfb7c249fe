"""Seeing what enters the down projections of FFNs while a model runs, in modules and in banks of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.units import FFN, Expert

# Called with an FFN; `[T, F]` what enters its down projection; and of an expert `[T]` the router's weights and which
# tokens of the call they are (None: all of them, in order).
See = Callable[[FFN, Tensor, Tensor | None, Tensor | None], None]


@contextmanager
def observing(group: list[FFN], see: See) -> Iterator[None]:
    """Inside, `see` is called whenever an FFN of the group runs.

    Args:
        group: FFNs, as `units.groups` gives them: one, or the experts of a layer.
    """
    handles = []
    first = group[0]
    if isinstance(first, Expert):
        bank = first.of_bank

        def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for number, rows, weights, tokens in bank.routed(args, kwargs):
                see(group[number], bank.activations(number, rows), weights, tokens)

        handles.append(bank.module.register_forward_pre_hook(routed, with_kwargs=True))
    else:
        for ffn in group:

            def entering(_: nn.Module, args: tuple[Tensor, ...], ffn: FFN = ffn) -> None:
                see(ffn, args[0].reshape(-1, args[0].shape[-1]), None, None)

            handles += [down.register_forward_pre_hook(entering) for down in ffn.downs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
