"""Calibration text, in the forms that the verbs take it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from ..base.progress import Progress, quiet
from ..base.ranks import Ranks
from ..base.windows import check_windows, stack_batches, token_windows
from ..model.towers import text_config
from .batches import Batch, are_batches, checked
from .mixture import DEFAULT, Windows, mix, unnamed

# `[N, W]` token ids or an iterable of `[W]` or `[B, W]`; windows of `mix`; with a tokenizer: prose (str), a file
# (Path), sources with their weights, or None for the default sources. Or a list of batches of keyword tensors.
Text = Iterable[Tensor] | Sequence[Mapping[str, Any]] | Tensor | Windows | Mapping[Any, float] | str | Path | None

# Of text that is not cut into windows yet.
TOKENS, MANY_TOKENS = 49_152, 131_072
WINDOW = 512


def longest(model: nn.Module, window: int = WINDOW) -> int:
    """`window`, or the model's context where that is shorter."""
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    return min(window, context) if isinstance(context, int) else window


def vocabulary(model: nn.Module) -> int | None:
    """Number of token ids the model knows, where its config says it."""
    found: int | None = getattr(text_config(model.config), "vocab_size", None)
    return found


def batches(model: nn.Module, text: Text) -> list[Batch] | None:
    """Text that is given as batches of keyword tensors, checked; None where it is given otherwise.

    Raises:
        InputError: see `batches.checked`.
    """
    if not are_batches(text):
        return None
    config: Any = model.config
    encodes = bool(getattr(config, "is_encoder_decoder", False))
    alone = text_config(config) is config and not encodes
    placed = alone and "position_ids" in inspect.signature(model.forward).parameters
    return checked(text, vocabulary(model), encodes, placed)  # type: ignore[arg-type]


def calibration(
    model: nn.Module, text: Text, tokenizer: Any = None, seed: int = 0, progress: Progress = quiet
) -> Windows | None:
    """Token windows by source; None where neither text nor tokenizer is given.

    Args:
        model: whose text it is to be, dense.
        text: token ids, `[N, W]` or an iterable of `[W]` or `[B, W]`, all of one W; or `mixture.Windows`. With a
            tokenizer also a `str` of prose, a `Path` of a file, a mapping of sources to weights (see `mixture.mix`), or
            None for what the model writes itself beside what CPython carries; of these `TOKENS` tokens, in windows of
            `WINDOW`, or of the model's context if shorter.
        tokenizer: the model's.
        seed: of what is sampled.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: text without a tokenizer, no window, token ids out of range, or windows longer than the context.
    """
    if text is None and tokenizer is None:
        return None
    if isinstance(text, Windows):
        found = text
    elif isinstance(text, Tensor) or not (text is None or isinstance(text, str | Path | Mapping)):
        found = unnamed(stack_batches(text, vocabulary(model), "text"))  # type: ignore[arg-type]
    else:
        check(tokenizer is not None, "tokenizer", "be given with text that is no token ids", None)
        if isinstance(text, str):
            found = unnamed(token_windows(tokenizer, text, TOKENS, longest(model)))
        else:
            given = DEFAULT if text is None else text
            sources: Mapping[Any, float] = given if isinstance(given, Mapping) else {given: 1.0}
            found = mix(sources, model, tokenizer, TOKENS, longest(model), seed=seed, progress=progress)
    stack_batches(found.ids, vocabulary(model), "text")
    check_windows(model, found.ids, "text")
    return found


def describe(text: Any) -> str:
    """A few characters that tell texts apart, in any of their forms; an iterator by its kind alone."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Windows | Batch):
            add(vars(value))
        elif isinstance(value, Mapping):
            add([part for item in value.items() for part in item])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}:".encode())
            for part in value:
                add(part)
        else:
            plain = value is None or isinstance(value, str | Path | int | float)
            digest.update(repr(value if plain else type(value).__name__).encode())

    add(text)
    return digest.hexdigest()[:12]


def agreed(ranks: Ranks, model: nn.Module, text: Text, tokenizer: Any, seed: int, progress: Progress) -> Windows | None:
    """`calibration` for processes that use one text together: what must be read or written, the first rank does."""

    def make() -> Windows | None:
        return calibration(model, text, tokenizer, seed, progress)

    given = text is not None and not isinstance(text, str | Path | Mapping)
    return make() if given or tokenizer is None else shared(ranks, make)


def shared(ranks: Ranks, make: Callable[[], Windows | None]) -> Windows | None:
    """What `make` gives on the first rank, on every one."""

    def pack(made: Windows | None) -> tuple[dict[str, Tensor], Any]:
        return ({}, None) if made is None else ({"ids": made.ids, "sources": made.sources}, list(made.names))

    def unpack(tensors: dict[str, Tensor], names: Any) -> Windows | None:
        return None if names is None else Windows(tensors["ids"], tensors["sources"], tuple(names))

    return ranks.first(make, pack, unpack)
