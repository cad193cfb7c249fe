"""Multiple choice made from plain text: which of four continuations is the one that stood there?

No download and no labels: a context and its true continuation are cut from the text, the others from elsewhere in it.
Perplexity is a mean over tokens, most of them easy; here every item is a decision, which a damaged model gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import check
from ..base.progress import Progress, quiet
from ..base.windows import check_windows
from .intervals import bootstrap

_ITEMS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class ChoiceItem:
    """One question.

    Attributes:
        context: `[C]` token ids.
        choices: `[K, N]` token ids; all choices are of one length.
        answer: the row of `choices` that continues the context in the text.
    """

    context: Tensor
    choices: Tensor
    answer: int


@dataclass(frozen=True)
class Choice:
    """How a model answered.

    Attributes:
        accuracy: share of items where the answer has the highest log-likelihood of a token.
        items: how many.
        interval: of the accuracy, 95 %, by bootstrap over items.
        correct: of each item.
        chance: the accuracy of guessing.
    """

    accuracy: float
    items: int
    interval: tuple[float, float]
    correct: tuple[bool, ...]
    chance: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the single items."""
        facts = {"accuracy": self.accuracy, "interval": list(self.interval), "items": self.items}
        return {**facts, "chance": self.chance}


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model minus that of another on the same items.

    Attributes:
        difference: of the two accuracies.
        interval: of it, 95 %, by bootstrap over items, both answers of an item drawn together.
    """

    difference: float
    interval: tuple[float, float]


def choice_items(
    text: str,
    tokenizer: Any,
    count: int = 200,
    context_tokens: int = 64,
    continuation_tokens: int = 16,
    choices: int = 4,
    seed: int = 0,
) -> list[ChoiceItem]:
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
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    size = context_tokens + continuation_tokens
    # One item's length more, so that there is an elsewhere.
    needed = (count + 1) * size
    rule = f"hold at least {needed} tokens for {count} items of {context_tokens} + {continuation_tokens}"
    check(len(ids) >= needed, "text", rule, f"{len(ids)} tokens")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(len(ids) // size, generator=generator)[:count].sort().values * size
    sizes = context_tokens, continuation_tokens, choices
    return [_item(ids, int(start), *sizes, generator) for start in starts]


def _item(ids: Tensor, start: int, context: int, length: int, choices: int, generator: torch.Generator) -> ChoiceItem:
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
    return ChoiceItem(ids[start:middle], torch.stack(found)[order], int((order == 0).nonzero()))


@torch.no_grad()
def choice_scores(model: Any, items: Sequence[ChoiceItem]) -> Tensor:
    """`[len(items), K]`: mean log-likelihood of a token of each choice, in nats, given the context.

    The context is run once, and its keys and values serve all choices of the item, where the model keeps such.

    Args:
        model: a causal LM of Transformers, in eval mode.
        items: of one context length, one choice length and one K.
    """
    device = next(model.parameters()).device
    contexts = torch.stack([item.context for item in items]).to(device)  # [B, C]
    choices = torch.stack([item.choices for item in items]).to(device)  # [B, K, N]
    batch, count, length = choices.shape
    flat = choices.view(batch * count, length)
    start = model(input_ids=contexts, use_cache=True)
    cache = start.past_key_values
    if all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
        cache.batch_repeat_interleave(count)
        logits = start.logits[:, -1:].repeat_interleave(count, 0)
        if length > 1:
            rest = model(input_ids=flat[:, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat([logits, rest], dim=1)
    else:  # a state that cannot be given to many, such as that of a convolution
        whole = torch.cat([contexts.repeat_interleave(count, 0), flat], dim=1)
        logits = model(input_ids=whole, use_cache=False).logits[:, -length - 1 : -1]
    likelihood = logits.float().log_softmax(-1).gather(-1, flat[..., None])
    return likelihood.view(batch, count, length).mean(-1).cpu()


def choice_accuracy(model: Any, items: Sequence[ChoiceItem], progress: Progress = quiet) -> Choice:
    """Answer every item by the choice with the highest log-likelihood of a token.

    Args:
        model: a causal LM of Transformers, in eval mode.
        items: as `choice_items` makes them.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no items, items of different sizes, longer ones than the model's context, or a model that gives NaN.
    """
    shapes = {(item.context.shape, item.choices.shape) for item in items}
    check(len(shapes) == 1, "items", "be at least one, all of one size", sorted(map(str, shapes)))
    longest = items[0].context.numel() + items[0].choices.shape[1]
    check_windows(model, torch.empty(1, longest), "items")
    correct: list[bool] = []
    for i in range(0, len(items), _ITEMS_AT_ONCE):
        progress("multiple choice", i, len(items))
        batch = items[i : i + _ITEMS_AT_ONCE]
        scores = choice_scores(model, batch)
        check(not scores.isnan().any(), "model", "give probabilities", "NaN")
        answers = scores.argmax(-1)
        correct += [int(answer) == item.answer for answer, item in zip(answers, batch, strict=True)]
    progress("multiple choice", len(items), len(items))
    values = torch.tensor(correct, dtype=torch.float64)
    chance = 1 / len(items[0].choices)
    return Choice(float(values.mean()), len(items), bootstrap(values), tuple(correct), chance)


def choice_difference(dense: Choice, pruned: Choice) -> Difference:
    """How much accuracy was lost, with the items' difficulty out of the way: both answered the same ones.

    Raises:
        InputError: they did not answer the same number of items.
    """
    check(dense.items == pruned.items, "pruned", f"have answered the same {dense.items} items", pruned.items)
    values = torch.tensor(dense.correct, dtype=torch.float64) - torch.tensor(pruned.correct, dtype=torch.float64)
    return Difference(float(values.mean()), bootstrap(values))
