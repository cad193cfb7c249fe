"""Batches of keyword tensors, as a model's forward takes them: ids with their mask, pictures with their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import check

IDS, MASK, THEIRS, THEIR_MASK = "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of a model.

    Attributes:
        words: what its forward gets.
        encodes: it is an encoder-decoder: the ids and their mask are the encoder's.
    """

    words: dict[str, Any]
    encodes: bool = False

    def positions(self, stack: int) -> Tensor | None:
        """`[B * T]` bool: positions of a list of layers (`FFN.stack`) that are no padding; None where all are."""
        mask = self.words.get(THEIR_MASK if self.encodes and stack else MASK)
        return None if mask is None or bool(mask.bool().all()) else mask.bool().reshape(-1)

    @property
    def tokens(self) -> Tensor:
        """`[n]`: the ids that are no padding."""
        ids: Tensor = self.words[IDS]
        mask = self.words.get(MASK)
        return ids.reshape(-1) if mask is None else ids[mask.bool()]


def of_windows(ids: Tensor, encodes: bool) -> list[Batch]:
    """Windows (`[N, W]` token ids) as batches of one; an encoder-decoder reads and writes the same."""
    rows = [ids[i : i + 1] for i in range(len(ids))]
    return [Batch({IDS: row, **({THEIRS: row} if encodes else {})}, encodes) for row in rows]


def are_batches(text: Any) -> bool:
    """Whether calibration text is given as keyword tensors; an iterator is none, for looking at it would use it up."""
    return isinstance(text, list | tuple) and bool(text) and all(isinstance(t, Mapping) for t in text)


def checked(
    text: Iterable[Mapping[str, Any]], vocabulary: int | None, encodes: bool, placed: bool = False
) -> list[Batch]:
    """Batches from outside.

    Args:
        text: mappings with `input_ids` `[B, T]`, perhaps `attention_mask` of the same shape, and whatever else the
            model's forward takes.
        vocabulary: number of token ids the model knows, or None.
        encodes: it is an encoder-decoder.
        placed: the model takes `position_ids`, one number a position: where padding stands in front of a text, they
            are given with the batch, so that the text begins at 0.

    Raises:
        InputError: no ids, ids out of range or no integers, a mask of another shape or with other values than 0 and 1,
            a batch of padding alone, or pictures that no processor has made tensors of.
    """
    found = []
    for i, given in enumerate(text):
        words = dict(given)
        ids = words.get(IDS)
        at = f"text[{i}]"
        for key in ("images", "image", "videos", "audio", "audios", "text"):
            rule = "hold what the model's processor makes of it (such as pixel_values), not the thing itself"
            check(key not in words, f"{at}[{key!r}]", rule, type(words.get(key)).__name__)
        check(isinstance(ids, Tensor) and ids.ndim == 2, f"{at}[{IDS!r}]", "be a [B, T] tensor of token ids", type(ids))
        assert isinstance(ids, Tensor)
        whole = not ids.is_floating_point() and ids.dtype != torch.bool and ids.numel() > 0
        check(whole, f"{at}[{IDS!r}]", "hold token ids", (str(ids.dtype), *ids.shape))
        low, high = int(ids.min()), int(ids.max())
        fits = low >= 0 and (vocabulary is None or high < vocabulary)
        check(fits, f"{at}[{IDS!r}]", f"lie in [0, {vocabulary})", (low, high))
        for name, of in ((MASK, ids), (THEIR_MASK, words.get(THEIRS))):
            mask = words.get(name)
            if mask is None:
                continue
            shape = None if of is None else tuple(of.shape)
            right = isinstance(mask, Tensor) and tuple(mask.shape) == shape
            check(right, f"{at}[{name!r}]", f"have the shape of its ids, {shape}", tuple(getattr(mask, "shape", ())))
            check(bool(((mask == 0) | (mask == 1)).all()), f"{at}[{name!r}]", "hold 0 and 1 only", mask.unique()[:4])
            check(bool(mask.any()), f"{at}[{name!r}]", "leave a position that is no padding", "none")
        if encodes:
            words.setdefault(THEIRS, ids)
            if words[THEIRS] is ids and MASK in words:
                words.setdefault(THEIR_MASK, words[MASK])
        mask = words.get(MASK)
        if placed and mask is not None and not bool(mask[:, 0].all()):
            words.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp_min(0))
        words = {k: v for k, v in words.items() if k not in ("labels", "use_cache")}
        found.append(Batch(words, encodes))
    return found


def as_windows(batches: list[Batch]) -> Tensor:
    """The ids of batches that are no padding, as one window of equal length a batch, for counting: `[N, W]`."""
    ids = torch.cat([batch.tokens for batch in batches])
    width = len(ids) // len(batches)
    return ids[: width * len(batches)].view(len(batches), width)
