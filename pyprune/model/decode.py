"""Continuations of the same prompts by different models, greedy or sampled with common random numbers.

A token is sampled as the argmax of logits / T + g with Gumbel noise g, which is a sample of softmax(logits / T) exactly
(Gumbel-max). Given the same prompts, the noise of each depends on seed and step alone, so two models with the same
logits draw the same token, and with nearly the same logits nearly always: what differs then is the models and not the
dice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..base.errors import check, is_count, is_finite
from ..base.progress import Progress, quiet

_AT_ONCE = 32


class _Gumbel(LogitsProcessor):
    """Adds the same noise at the same step, whoever decodes."""

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator).log().neg()
        return scores.float() / self._temperature + noise.to(scores.device)


def end_tokens(model: Any) -> list[int]:
    """Tokens that end a text of this model."""
    end = getattr(model.generation_config, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    return [] if end is None else list(end) if isinstance(end, list | tuple) else [end]


def plain(model: Any) -> Any:
    """The model, but that its `generate` does what it is told: penalties, beams and the like, which a checkpoint's own
    generation config brings, are not in force; nor are its end tokens. The model itself is as it was.
    """
    found = copy.copy(getattr(model, "_orig_mod", model))  # what torch.compile wraps generates by itself
    found.generation_config = GenerationConfig()
    return found


def check_prompts(model: Any, prompts: Sequence[Tensor], new_tokens: int) -> None:
    """Raise `InputError` unless every prompt (`[P]` token ids) and its continuation fit into the model's context."""
    check(is_count(new_tokens) and new_tokens >= 1, "new_tokens", "be a positive integer", new_tokens)
    check(len(prompts) > 0, "prompts", "be at least one", len(prompts))
    empty = [i for i, prompt in enumerate(prompts) if prompt.ndim != 1 or not len(prompt)]
    check(not empty, "prompts", "be [P] token ids, none empty; these are not", empty)
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int):
        room = longest - new_tokens
        rule = f"have at most {room} tokens: {longest} of context (max_position_embeddings) less {new_tokens} new ones"
        number = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        check(len(prompts[number]) <= room, f"prompt {number}", rule, len(prompts[number]))


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = quiet,
    padded: bool = False,
) -> list[Tensor]:
    """Continue every prompt.

    Args:
        model: a causal LM of Transformers, in eval mode.
        prompts: token ids, `[P]` each; those of one length run as one batch.
        new_tokens: of a continuation at most.
        temperature: 0 is greedy; above 0 samples.
        seed: of the noise.
        progress: called as `(stage, done, total)`.
        padded: run prompts of all lengths together, filled up on the left and masked there: faster, and the same but
            for rounding, which may decide between two tokens that are as likely.

    Returns:
        Token ids `[n]` for each prompt, n <= new_tokens, with the end token if one came.

    Raises:
        InputError: no prompt, an empty or too long one, less than one new token, a negative temperature.
    """
    check(is_finite(temperature) and temperature >= 0, "temperature", "be 0 or more, and finite", temperature)
    check_prompts(model, prompts, new_tokens)
    ends = end_tokens(model)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    found: dict[int, Tensor] = {}
    lengths = sorted({len(prompt) for prompt in prompts})
    groups = [[i for i, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    if padded:
        groups = [[i for group in groups for i in group]]
    batches = [group[i : i + _AT_ONCE] for group in groups for i in range(0, len(group), _AT_ONCE)]
    device = next(model.parameters()).device
    for batch in batches:
        progress("generating", len(found), len(prompts))
        rows = [prompts[i] for i in batch]
        longest = max(map(len, rows))
        ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows]).to(device)
        mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]).to(device)
        # Its own seed for each batch: the noise does not depend on how long the texts of batches before it became.
        noise = LogitsProcessorList([_Gumbel(temperature, seed + batch[0])] if temperature else [])
        out = plain(model).generate(ids, attention_mask=mask, generation_config=settings, logits_processor=noise)
        for i, row in zip(batch, out[:, ids.shape[1] :].cpu(), strict=True):
            stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
            found[i] = row[: int(stops[0]) + 1] if len(stops) else row
    progress("generating", len(prompts), len(prompts))
    return [found[i] for i in range(len(prompts))]
