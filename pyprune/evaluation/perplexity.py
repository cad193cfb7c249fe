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
def window_losses(model: Any, windows: Tensor, progress: Progress = quiet) -> Tensor:
    """Negative log-likelihood of the predicted tokens of each window, summed, in nats.

    Args:
        model: a causal LM of Transformers, in eval mode.
        windows: `[N, W]` token ids; W - 1 of a window are predicted.
        progress: called as `(stage, done, total)`.

    Returns:
        `[N]` float64.

    Raises:
        InputError: windows longer than the model's context, or logits that are NaN.
    """
    check_windows(model, windows, "text")
    found = torch.zeros(len(windows), dtype=torch.float64)
    device = next(model.parameters()).device
    for i, window in enumerate(windows):
        progress("measuring perplexity", i, len(windows))
        ids = window.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        found[i] = float(torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum"))
    progress("measuring perplexity", len(windows), len(windows))
    check(not bool(found.isnan().any()), "model", "give numbers for logits on this text", "NaN")
    return found


def exponential(mean: float) -> float:
    """Perplexity of a mean loss in nats; infinite where no float holds it."""
    return math.exp(mean) if mean < 700 else math.inf


def perplexity(model: Any, windows: Tensor, progress: Progress = quiet) -> Perplexity:
    """Token perplexity of a causal LM (not word perplexity: text is never detokenised).

    Args and errors as for `window_losses`.
    """
    total = sum(window_losses(model, windows, progress).tolist())
    predicted = len(windows) * (windows.shape[1] - 1)
    return Perplexity(exponential(total / predicted), windows.numel(), predicted, windows.shape[1])
