"""How far a pruned model's greedy text is from the dense model's, and whether it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..base.errors import check
from ..base.progress import Progress, quiet
from ..model.decode import decode
from .likeness import distinct, divergence, repetition
from .perplexity import exponential
from .tasks.encoding import prompt_ids

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


def common_start(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many first tokens are the same; `limit` for two that are the same to their ends."""
    first = divergence(a, b)
    return limit if first is None else first - 1


@torch.no_grad()
def _log_likelihood(model: Any, prompt: Tensor, continuation: Tensor) -> float:
    """Of the continuation's tokens given the prompt, in nats."""
    ids = torch.cat([prompt, continuation])[None].to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return -float(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum"))


def perplexity_of(model: Any, prompts: Sequence[Tensor], texts: Sequence[Tensor]) -> float:
    """Of texts, `[n]` token ids, under a model that has read their prompts, `[P]`, which do not count."""
    mean = -sum(_log_likelihood(model, *pair) for pair in zip(prompts, texts, strict=True)) / sum(map(len, texts))
    return exponential(mean)


def _written(dense: Any, starts: Sequence[Tensor], texts: Sequence[Tensor]) -> Written:
    tokens = [text.tolist() for text in texts]
    perplexity = perplexity_of(dense, starts, texts)
    return Written(fmean(map(repetition, tokens)), distinct(tokens, 2), perplexity, sum(map(len, tokens)))


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
        InputError: no prompt, an empty one, one too long for the context, or less than one new token.
    """
    check(bool(prompts) and all(p.strip() for p in prompts), "prompts", "be some, none of them empty", len(prompts))
    check(new_tokens >= 1, "new_tokens", "be at least 1", new_tokens)
    starts = [torch.tensor(prompt_ids(tokenizer, prompt), dtype=torch.int64) for prompt in prompts]
    texts = [decode(model, starts, new_tokens, progress=progress) for model in (dense, pruned)]
    same = [common_start(a.tolist(), b.tolist(), new_tokens) for a, b in zip(*texts, strict=True)]
    steps = [*(n for n in STEPS if n < new_tokens), new_tokens]
    agree = {n: fmean(length >= n for length in same) for n in steps}
    wrote = [_written(dense, starts, text) for text in texts]
    return Deltas(len(prompts), new_tokens, agree, fmean(same), *wrote)
