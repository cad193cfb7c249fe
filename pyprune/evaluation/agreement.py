"""How far a pruned model's greedy text is from the dense model's, and whether it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..calibration import Progress, quiet
from ..errors import check
from .likeness import distinct, repetition

# Agreement is reported for this many first tokens, and for all.
STEPS = (1, 4, 16)


@dataclass(frozen=True)
class Written:
    """What one model wrote.

    Attributes:
        repetition: share of 4-grams of a continuation that stood in it before; mean over continuations, 0 for those
            shorter than 4 tokens.
        distinct2: different bigrams over bigrams, of all continuations together; 0 where none has two tokens.
        perplexity: of the continuations' tokens under the dense model, given the prompt.
        tokens: of all continuations.
    """

    repetition: float
    distinct2: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Deltas:
    """Greedy continuations of the same prompts by two models.

    Attributes:
        prompts: how many.
        new_tokens: of a continuation at most.
        agree: share of prompts whose first n tokens are the same, by n; the largest n is `new_tokens`.
        divergence: mean number of tokens before the first that differs; `new_tokens` where none does.
        dense, pruned: what they wrote.
    """

    prompts: int
    new_tokens: int
    agree: dict[int, float]
    divergence: float
    dense: Written
    pruned: Written

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, progress: Progress = quiet
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt its token ids `[P]` and those that follow greedily `[N]`, with the end token if one came."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = []
    for i, prompt in enumerate(prompts):
        progress("generating", i, len(prompts))
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
        )
        found.append((ids[0].cpu(), out[0, ids.shape[1] :].cpu()))
    progress("generating", len(prompts), len(prompts))
    return found


def common_start(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many first tokens are the same; `limit` for two that are the same to their ends."""
    if list(a) == list(b):
        return limit
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@torch.no_grad()
def _log_likelihood(model: Any, prompt: Tensor, continuation: Tensor) -> float:
    """Of the continuation's tokens given the prompt, in nats."""
    ids = torch.cat([prompt, continuation])[None].to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return -float(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum"))


def _written(dense: Any, texts: Sequence[tuple[Tensor, Tensor]]) -> Written:
    tokens = [continuation.tolist() for _, continuation in texts]
    count = sum(map(len, tokens))
    mean = -sum(_log_likelihood(dense, *text) for text in texts) / count
    return Written(
        fmean(map(repetition, tokens)),
        distinct(tokens, 2),
        math.exp(mean) if mean < 700 else math.inf,
        count,
    )


def generation_deltas(
    dense: Any, pruned: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 48, progress: Progress = quiet
) -> Deltas:
    """Let two models continue the same prompts greedily, and compare.

    Args:
        dense, pruned: causal LMs of Transformers, in eval mode, of one tokenizer.
        tokenizer: theirs.
        prompts: texts to continue.
        new_tokens: tokens to add at most.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no prompt, an empty one, or less than one new token.
    """
    check(bool(prompts) and all(p.strip() for p in prompts), "prompts", "be some, none of them empty", len(prompts))
    check(new_tokens >= 1, "new_tokens", "be at least 1", new_tokens)
    texts = [continuations(model, tokenizer, prompts, new_tokens, progress) for model in (dense, pruned)]
    same = [common_start(a.tolist(), b.tolist(), new_tokens) for (_, a), (_, b) in zip(texts[0], texts[1], strict=True)]
    steps = [*(n for n in STEPS if n < new_tokens), new_tokens]
    agree = {n: fmean(length >= n for length in same) for n in steps}
    return Deltas(len(prompts), new_tokens, agree, fmean(same), _written(dense, texts[0]), _written(dense, texts[1]))
