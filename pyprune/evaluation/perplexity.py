"""Token perplexity over windows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import check
from ..base.progress import Progress, quiet
from ..base.windows import check_windows


@dataclass(frozen=True)
class Perplexity:
    """Token perplexity.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token, in nats.
        tokens: tokens in the windows.
        predicted: tokens that were predicted, window - 1 in each window.
        window: tokens in a window; windows do not overlap and share no context.
    """

    perplexity: float
    tokens: int
    predicted: int
    window: int


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, progress: Progress = quiet) -> Perplexity:
    """Token perplexity of a causal LM (not word perplexity: text is never detokenised).

    Args:
        model: a causal LM of Transformers, in eval mode.
        windows: `[N, W]` token ids.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: windows longer than the model's context, or logits that are NaN.
    """
    check_windows(model, windows, "text")
    total, predicted = 0.0, 0
    device = next(model.parameters()).device
    for i, window in enumerate(windows):
        progress("measuring perplexity", i, len(windows))
        ids = window.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum")
        total += float(loss)
        predicted += len(ids) - 1
    progress("measuring perplexity", len(windows), len(windows))
    mean = total / predicted
    check(not math.isnan(mean), "model", "give numbers for logits on this text", "NaN")
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, windows.numel(), predicted, windows.shape[1])
