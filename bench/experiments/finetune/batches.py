"""Pairs of prompt and target -> padded batches, whose loss counts the target only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.base.errors import check

# The prompt ends here; what follows is the model's to write.
SEPARATOR = "\n"
_IGNORED = -100
# Batches are cut from so many at a time, sorted by length: little padding, and still a random order.
_POOL = 16

Encoded = tuple[list[int], int]


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], ends: bool = True) -> list[Encoded]:
    """Token ids of `prompt SEPARATOR target END`, and how many are the prompt's; no END where a text goes on."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    targets = tokenizer([target for _, target in pairs], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if ends else []
    return [([*p, *t, *end], len(p)) for p, t in zip(prompts, targets, strict=True)]


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each `prompt SEPARATOR`."""
    found: list[list[int]] = tokenizer([p + SEPARATOR for p in prompts], add_special_tokens=False)["input_ids"]
    return found


def collate(rows: Sequence[Encoded], pad: int, device: Any = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each `[B, longest]`, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), _IGNORED)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def batches(
    rows: Sequence[Encoded], size: int, steps: int, seed: int, pad: int, device: Any = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """`steps` batches of `size` rows, epoch after epoch in an order that `seed` fixes.

    Raises:
        InputError: fewer rows than one batch needs.
    """
    check(len(rows) >= size, "batch", f"be at most the number of training pairs ({len(rows)})", size)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for at in range(0, len(order) - size + 1, size * _POOL):
            pool = sorted(order[at : at + size * _POOL], key=lambda i: len(rows[i][0]))
            chunks = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            for k in torch.randperm(len(chunks), generator=generator).tolist():
                if done == steps:
                    return
                done += 1
                yield collate([rows[i] for i in chunks[k]], pad, device)
