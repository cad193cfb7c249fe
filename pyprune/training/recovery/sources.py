"""Text by source: what is trained on, and what of every source is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.windows import check_windows, stack_batches
from ...pruning.mixture import Windows
from .config import RecoverConfig

# Of token ids that nobody gave a source.
UNNAMED = ("",)


def as_windows(text: Tensor | Windows, models: Sequence[Any], argument: str) -> Windows:
    """Windows by source, checked; names that are there twice get a number.

    Raises:
        InputError: token ids out of range, windows of less than 2 tokens or longer than a model's context, or sources
            that do not fit the windows.
    """
    ids = text.ids if isinstance(text, Windows) else text
    ids = stack_batches(ids, models[0].config.get_text_config().vocab_size)
    check(ids.shape[1] >= 2, argument, "have at least 2 tokens", ids.shape[1])
    for model in models:
        check_windows(model, ids, argument)
    if not isinstance(text, Windows):
        return Windows(ids, torch.zeros(len(ids), dtype=torch.int64), UNNAMED)
    names, sources = text.names, text.sources.long().cpu()
    rule = f"give each of {len(ids)} windows one of {len(names)} names, and each name a window"
    check(sources.shape == (len(ids),), f"sources of {argument}", rule, tuple(sources.shape))
    found = sources.unique().tolist()
    check(found == list(range(len(names))), f"sources of {argument}", rule, found)
    unique = (n if names.count(n) == 1 else f"{n} #{i + 1}" for i, n in enumerate(names))
    return Windows(ids, sources, tuple(unique))


def of_source(windows: Windows, place: int) -> Tensor:
    """`[n, W]`: the windows of one source, in their order."""
    return windows.ids[windows.sources == place]


def split(windows: Windows, held_out: Windows | None, config: RecoverConfig) -> tuple[Windows, Windows | None]:
    """The windows to train on, and the held-out ones: those given, or the last of every source, or none.

    Raises:
        InputError: too few windows to train on.
    """
    if held_out is None and config.held_out:
        out = torch.zeros(len(windows.ids), dtype=torch.bool)
        for i, name in enumerate(windows.names):
            places = (windows.sources == i).nonzero().flatten()
            count = max(1, round(config.held_out * len(places)))
            alone = len(windows.names) == 1
            check(alone or len(places) > count, f"text {name}", "hold at least 2 windows, one held out", len(places))
            out[places[-count:]] = True
        windows, held_out = (Windows(windows.ids[w], windows.sources[w], windows.names) for w in (~out, out))
    check(len(windows.ids) >= config.batch, "text", f"hold at least {config.batch} windows (batch)", len(windows.ids))
    return windows, held_out
