"""Calibration text, in the forms that the verbs take it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base.errors import check
from ..base.text import load_text, token_windows
from ..base.windows import check_windows, stack_batches

# `[N, W]` token ids or an iterable of `[W]` or `[B, W]`; with a tokenizer: prose (str), a file (Path), or None.
Text = Iterable[Tensor] | Tensor | str | Path | None

# Of text that is not cut into windows yet.
TOKENS = 16_384
WINDOW = 1024


def calibration(model: nn.Module, text: Text, tokenizer: Any = None) -> tuple[Tensor | None, str | None]:
    """Token windows, and the text's name where it has one; no windows where neither text nor tokenizer is given.

    Args:
        model: whose text it is to be.
        text: token ids, `[N, W]` or an iterable of `[W]` or `[B, W]`, all of one W. With a tokenizer also a `str` of
            prose, a `Path` of a file (UTF-8 text or .jsonl with a 'text' field), or None for prose that CPython
            carries; of these the first `TOKENS` tokens, in windows of `WINDOW`, or of the model's context if shorter.
        tokenizer: the model's.

    Raises:
        InputError: text without a tokenizer, no window, token ids out of range, or windows longer than the context.
    """
    name = None
    if text is None and tokenizer is None:
        return None, None
    if text is None or isinstance(text, str | Path):
        check(tokenizer is not None, "tokenizer", "be given with text that is no token ids", None)
        content = text
        if not isinstance(content, str):
            content, name = load_text(content, "first")
        longest = getattr(model.config, "max_position_embeddings", None)
        text = token_windows(tokenizer, content, TOKENS, min(WINDOW, longest or WINDOW))
    ids = stack_batches(text, getattr(model.config, "vocab_size", None), "text")
    check_windows(model, ids, "text")
    return ids, name
