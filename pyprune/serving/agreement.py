"""Prompts on which an export must give what the checkpoint gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import CheckpointError
from ..base.text import default_text
from ..base.windows import token_windows

PROMPTS, LENGTH = 4, 64


def prompts(tokenizer: Any | None, config: Any) -> Tensor:
    """`[4, 64]` token ids: Python's documentation, or without a tokenizer random ids that are always the same."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (PROMPTS, LENGTH), generator=generator)
    return token_windows(tokenizer, default_text(), PROMPTS * LENGTH, LENGTH)


@torch.no_grad()
def exact_logits(model: Any, tokens: Tensor) -> Tensor:
    """`[N, L, V]` logits of `[N, L]` token ids by a copy of a model, in float32 or wider."""
    wide = copy.deepcopy(model).to(torch.promote_types(model.dtype, torch.float32))
    logits: Tensor = wide(tokens.to(wide.device)).logits
    return logits


def check_same(before: Tensor, after: Tensor, path: Path) -> float:
    """How far logits lie from those of the checkpoint, over the largest of those.

    More neurons are added up in another order, so logits in float32 differ by its rounding at most.

    Raises:
        CheckpointError: they differ by more than 1e-4.
    """
    apart = float((after - before).abs().max() / before.abs().max())
    if not apart <= 1e-4:
        raise CheckpointError(f"{path.name} gives logits {apart:.3g} from the checkpoint's; nothing was written")
    return apart
