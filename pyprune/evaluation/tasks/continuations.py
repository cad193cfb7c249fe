"""Multiple choice made from plain text: which of some continuations is the one that stood there?

No download and no labels: a context and its true continuation are cut from the text, the others from elsewhere in it.
Perplexity is a mean over tokens, most of them easy; here every item is a decision, which a damaged model gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.progress import Progress, quiet
from ...base.windows import plain_ids, start_ids
from .choice import log_likelihoods
from .encoding import Row


@dataclass(frozen=True)
class Continuation:
    """One question.

    Attributes:
        context: token ids.
        options: K of them, token ids, all of one length.
        answer: the number of the option that continues the context in the text.
    """

    context: Row
    options: tuple[Row, ...]
    answer: int


def continuations(
    text: str,
    tokenizer: Any,
    count: int = 200,
    context_tokens: int = 64,
    continuation_tokens: int = 16,
    choices: int = 4,
    seed: int = 0,
) -> list[Continuation]:
    """Make questions from a text.

    Args:
        text: any prose that the model was not fitted on.
        tokenizer: a Transformers tokenizer.
        count: how many items; their contexts and continuations do not overlap.
        context_tokens: C, at least 1.
        continuation_tokens: N, at least 1.
        choices: K, at least 2; wrong ones come from anywhere in the text outside the item, and differ from the answer.
        seed: of everything drawn.

    Raises:
        InputError: a number too small; a text too short, or too repetitive to have K different continuations.
    """
    check(count >= 1, "count", "be at least 1", count)
    check(context_tokens >= 1, "context_tokens", "be at least 1", context_tokens)
    check(continuation_tokens >= 1, "continuation_tokens", "be at least 1", continuation_tokens)
    check(choices >= 2, "choices", "be at least 2", choices)
    ids = torch.tensor(plain_ids(tokenizer, text), dtype=torch.int64)
    head = tuple(start_ids(tokenizer))
    size = context_tokens + continuation_tokens
    # One item's length more, so that there is an elsewhere.
    needed = (count + 1) * size
    rule = f"hold at least {needed} tokens for {count} items of {context_tokens} + {continuation_tokens}"
    check(len(ids) >= needed, "text", rule, f"{len(ids)} tokens")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(len(ids) // size, generator=generator)[:count].sort().values * size
    sizes = context_tokens, continuation_tokens, choices
    items = [_item(ids, int(start), *sizes, generator) for start in starts]
    return [replace(item, context=(*head, *item.context)) for item in items]


def _item(ids: Tensor, start: int, context: int, length: int, choices: int, generator: torch.Generator) -> Continuation:
    middle, end = start + context, start + context + length
    found = [ids[middle:end]]
    for _ in range(100 * choices):
        place = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        candidate = ids[place : place + length]
        outside = place >= end or place + length <= start
        if outside and not any(torch.equal(candidate, other) for other in found):
            found.append(candidate)
        if len(found) == choices:
            break
    rule = f"have {choices} different continuations of {length} tokens (it repeats itself)"
    check(len(found) == choices, "text", rule, len(found))
    order = torch.randperm(choices, generator=generator)
    options = tuple(tuple(found[i].tolist()) for i in order)
    return Continuation(tuple(ids[start:middle].tolist()), options, int((order == 0).nonzero()))


def continuations_correct(model: Any, items: Sequence[Continuation], progress: Progress = quiet) -> Tensor:
    """`[N]` float64: 1 where the likeliest option is the answer, 0 where not.

    Args:
        model: a causal LM of Transformers, in eval mode.
        items: as `continuations` makes them.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no items, one longer than the model's context, or logits that are not finite.
    """
    encoded = [[(item.context, option) for option in item.options] for item in items]
    found = log_likelihoods(model, encoded, progress, "items")
    return torch.tensor([float(f.argmax() == item.answer) for f, item in zip(found, items, strict=True)]).double()
