"""Windows of calibration tokens, checked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import check


def stack_batches(batches: Iterable[Tensor] | Tensor, vocabulary: int | None, argument: str = "batches") -> Tensor:
    """Collect token batches into `[N, W]` int64.

    Args:
        batches: a `[N, W]` tensor or an iterable of `[W]` or `[B, W]` tensors, all of one window length.
        vocabulary: number of token ids the model knows, or None.
        argument: what errors call them.

    Raises:
        InputError: no batch, windows of different lengths, not integers, or ids out of range.
    """
    given = [batches] if isinstance(batches, Tensor) else list(batches)
    strange = [type(b).__name__ for b in given if not isinstance(b, Tensor) or b.ndim == 0]
    check(not strange, argument, "hold tensors of shape [W] or [N, W]", strange[:3])
    check(bool(given) and all(b.numel() for b in given), argument, "hold at least one window", len(given))
    rows = [b.reshape(-1, b.shape[-1]) for b in given]
    lengths = sorted({r.shape[1] for r in rows})
    check(len(lengths) == 1, argument, "have windows of one length", lengths)
    ids = torch.cat(rows)
    fractional = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    check(not fractional, argument, "hold token ids", ids.dtype)
    ids = ids.long().cpu()
    low, high = int(ids.min()), int(ids.max())
    check(low >= 0 and (vocabulary is None or high < vocabulary), argument, f"lie in [0, {vocabulary})", (low, high))
    return ids


def check_windows(model: nn.Module, windows: Tensor, argument: str) -> None:
    """Raise `InputError` when windows (`[N, W]`) are longer than the model's context."""
    longest = getattr(model.config, "max_position_embeddings", None)
    fits = not isinstance(longest, int) or windows.shape[1] <= longest
    check(fits, argument, f"have windows of at most {longest} tokens (max_position_embeddings)", windows.shape[1])
