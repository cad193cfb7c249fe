"""Causal attention in bfloat16 on CPUs without matrix tiles, where torch's fused kernel is slow.

On an AMD EPYC (Zen 5, two cores; 4 windows of 512 tokens, 9 heads of 64) that kernel takes 16 ms, and 33 ms backward;
these blocks of queries take 5 and 9. `bench/notes/quality.md` says what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..base.machine import fast_bfloat16

NAME, FUSED = "pyprune_blocks", "sdpa"
# Queries of a block: of 32, 64, 128 and 256 the fastest; a block reads the keys up to its own last one.
BLOCK = 128


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of each token to those up to itself.

    Args:
        query: `[B, H, N, D]`.
        key, value: `[B, KV, N, D]` and `[B, KV, N, E]`; KV divides H.
        scale: of the scores.

    Returns:
        `[B, H, N, E]`; scores and probabilities are rounded to the dtype of the operands.
    """
    (batch, heads, tokens, _), shared = query.shape, key.shape[1]
    group = heads // shared
    query = (query * scale).reshape(batch * shared, group, tokens, -1)
    keys, values = key.flatten(0, 1).mT, value.flatten(0, 1)
    ahead = query.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
    blocks = []
    for start in range(0, tokens, BLOCK):
        end = min(tokens, start + BLOCK)
        rows = end - start
        scores = query[:, :, start:end].flatten(1, 2) @ keys[:, :, :end]
        scores.unflatten(1, (group, rows))[..., start:].add_(ahead[:rows, :rows])
        blocks.append((scores.softmax(-1) @ values[:, :end]).unflatten(1, (group, rows)))
    return torch.cat(blocks, 2).reshape(batch, heads, tokens, -1)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls; torch's kernel for all that is not plain causal attention in bfloat16."""
    lower = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if lower else query.dtype
    plain = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and not dropout and query.shape[2] == key.shape[2] > 1
    if not (plain and whole and dtype == torch.bfloat16 and query.device.type == "cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    with torch.autocast("cpu", enabled=False):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = causal(query.to(dtype), key.to(dtype), value.to(dtype), scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _gains(model: Any) -> bool:
    """Whether a model takes torch's kernel now, would take another by name, and runs where blocks are faster."""
    config, cpu = model.config, torch.device("cpu")
    here = all(p.device.type in ("cpu", "meta") for p in model.parameters())  # on meta: what is read when it is needed
    named = config.get_text_config() is config and getattr(config, "_attn_implementation", None) == FUSED
    faster = fast_bfloat16(cpu) and not torch.cpu._is_amx_tile_supported()
    return here and faster and named and getattr(model, "_supports_attention_backend", False)


@contextmanager
def in_blocks(*models: nn.Module) -> Iterator[None]:
    """Inside, models attend in blocks where that is faster: in bfloat16 products only, and within their rounding."""
    changed: list[Any] = [model for model in models if _gains(model)]
    try:
        for model in changed:
            model.set_attn_implementation(NAME)
        yield
    finally:
        for model in changed:
            model.set_attn_implementation(FUSED)
