"""Multiple choice cut from plain text: items by hand, and models whose accuracy is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from task_cases import Bigrams, Letters

from pyprune import InputError
from pyprune.base.text import default_text
from pyprune.evaluation.tasks import continuations, continuations_correct

COUNTING = "".join(chr(32 + i % 90) for i in range(2_000))


def follows(step: int) -> Bigrams:
    """Expects token n + step after token n."""
    return Bigrams(torch.eye(128).roll(step, 1) * 9)


def test_items_are_what_the_text_says() -> None:
    items = continuations(COUNTING, Letters(), 40, 7, 5, 4)
    text = tuple(map(ord, COUNTING))
    windows = {text[i : i + 5] for i in range(len(text) - 4)}
    spans = {text[i : i + 12] for i in range(0, len(text) - 11, 12)}
    for item in items:
        assert (*item.context, *item.options[item.answer]) in spans, "an item that is no span of the text"
        assert len(set(item.options)) == 4, "an option twice"
        assert windows >= set(item.options), "an option that is not in the text"
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert items == continuations(COUNTING, Letters(), 40, 7, 5, 4, seed=0)
    assert items != continuations(COUNTING, Letters(), 40, 7, 5, 4, seed=1)


def test_rigged_models_have_known_accuracy() -> None:
    items = continuations(COUNTING, Letters(), 30, 7, 3, 4)
    right = continuations_correct(follows(1), items)
    straight = [all(b == a + 1 for a, b in pairwise((*i.context[-1:], *i.options[i.answer]))) for i in items]
    assert len(right) == 30 and straight.count(True) > 20
    assert right[torch.tensor(straight)].all()
    assert continuations_correct(follows(0), items).sum() < right.sum()
    # Where the rigged order of options is known, so is the answer: the likeliest option is the one that counts.
    flipped = [replace(i, answer=(i.answer + 1) % 4) for i, s in zip(items, straight, strict=True) if s]
    assert continuations_correct(follows(1), flipped).sum() == 0


def test_a_real_text_has_items(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    """And the answers of a real model are those of single passes over single options."""
    items = continuations(default_text()[:30_000], tokenizer, 20, 12, 4)
    model, seen = tiny("llama", vocab_size=1024), []
    found = continuations_correct(model, items, lambda stage, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    for item, right in zip(items, found, strict=True):
        losses = []
        for option in item.options:
            ids = torch.tensor([[*item.context, *option]])
            labels = torch.where(torch.arange(ids.shape[1]) < len(item.context), -100, ids)
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        assert bool(right) == (losses.index(min(losses)) == item.answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"continuation_tokens": 0}, "continuation_tokens must be at least 1"),
        ({"choices": 1}, "choices must be at least 2; got 1"),
        ({"count": 500}, r"text must hold at least 6012 tokens for 500 items of 7 \+ 5; got '2000 tokens'"),
        ({"text": "aaaa" * 500}, "text must have 4 different continuations of 5 tokens .*; got 1"),
    ],
)
def test_bad_text(arguments: dict[str, Any], message: str) -> None:
    given = {"text": COUNTING, "count": 10, "context_tokens": 7, "continuation_tokens": 5}
    with pytest.raises(InputError, match=message):
        continuations(tokenizer=Letters(), **{**given, **arguments})


def test_bad_items(tiny: Callable[..., Any]) -> None:
    model, items = tiny("llama"), continuations(COUNTING, Letters(), 4, 7, 5)
    with pytest.raises(InputError, match="items must be at least one"):
        continuations_correct(model, [])
    with pytest.raises(InputError, match="windows of at most 64 tokens"):
        continuations_correct(model, continuations(COUNTING, Letters(), 1, 60, 5))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="model must give finite logits"):
        continuations_correct(model, items)
