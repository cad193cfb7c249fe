"""Multiple choice from plain text: items by hand, scores against whole sequences, models whose accuracy is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyprune import InputError
from pyprune.base.text import default_text
from pyprune.evaluation import Choice, ChoiceItem, choice_accuracy, choice_difference, choice_items
from pyprune.evaluation.choice import bootstrap, choice_scores


class Letters:
    """A tokenizer that has a token for each character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class Follows(nn.Module):
    """Expects token n + step after token n; without a cache."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(128).roll(step, 1) * 9)
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight[input_ids], past_key_values=None)


COUNTING = "".join(chr(32 + i % 90) for i in range(2_000))


def test_items_are_what_the_text_says() -> None:
    items = choice_items(COUNTING, Letters(), 40, 7, 5, 4)
    text = torch.tensor([ord(c) for c in COUNTING])
    windows = text.unfold(0, 5, 1)
    spans = text[: len(text) // 12 * 12].view(-1, 12)
    for item in items:
        whole = torch.cat([item.context, item.choices[item.answer]])
        assert (spans == whole).all(1).any(), "an item that is no span of the text"
        assert len({tuple(c) for c in item.choices.tolist()}) == 4, "a choice twice"
        assert all((windows == choice).all(1).any() for choice in item.choices), "a choice that is not in the text"
    assert {item.answer for item in items} == {0, 1, 2, 3}
    again, other = (choice_items(COUNTING, Letters(), 40, 7, 5, 4, seed) for seed in (0, 1))
    assert all(torch.equal(a.choices, b.choices) for a, b in zip(items, again, strict=True))
    assert not all(torch.equal(a.choices, b.choices) for a, b in zip(items, other, strict=True))


def test_rigged_models_have_known_accuracy() -> None:
    items = choice_items(COUNTING, Letters(), 30, 7, 3, 4)
    knows, wrong = choice_accuracy(Follows(1), items), choice_accuracy(Follows(0), items)
    wraps = sum((item.choices[item.answer].diff() < 0).any() or item.context[-1] == 121 for item in items)
    assert wraps < 10
    assert knows.accuracy >= 1 - wraps / 30 and knows.items == 30 and knows.chance == 0.25
    # Where the rigged order of choices is known, so is the answer: the likeliest choice is the one that counts.
    flipped = [ChoiceItem(i.context, i.choices, (i.answer + 1) % 4) for i in items if i.context[-1] < 110]
    nothing = choice_accuracy(Follows(1), flipped)
    assert (nothing.accuracy, nothing.interval) == (0.0, (0.0, 0.0))
    assert wrong.accuracy < knows.accuracy
    assert sum(knows.correct) / 30 == knows.accuracy and "correct" not in knows.to_json()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "lfm2"])
def test_scores_are_those_of_whole_sequences(tiny: Callable[..., Any], family: str) -> None:
    """Keys and values that choices share change nothing, also of a sliding window, or where a layer has others."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, 128, shape, generator=generator)

    for length in (1, 5):
        items = [ChoiceItem(draw(9), draw(4, length), 0) for _ in range(2)]
        for item, scores in zip(items, choice_scores(model, items), strict=True):
            for choice, score in zip(item.choices, scores, strict=True):
                ids = torch.cat([item.context, choice])[None]
                labels = torch.where(torch.arange(ids.shape[1]) < 9, -100, ids)
                with torch.no_grad():
                    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                assert float(score) == pytest.approx(-float(loss), rel=1e-4)


def test_difference_is_paired() -> None:
    """The same two accuracies: the interval is narrow where the models agree on the items, wide where they do not."""

    def answers(correct: list[bool]) -> Choice:
        return Choice(sum(correct) / len(correct), len(correct), (0.0, 1.0), tuple(correct), 0.25)

    dense = answers([True] * 60 + [False] * 40)
    near, far = answers([True] * 50 + [False] * 50), answers([False] * 40 + [True] * 50 + [False] * 10)
    narrow, wide = choice_difference(dense, near), choice_difference(dense, far)
    assert narrow.difference == pytest.approx(0.1) and wide.difference == pytest.approx(0.1)
    assert 0.03 < narrow.interval[0] < 0.1 < narrow.interval[1] < 0.18
    assert wide.interval[0] < -0.05 and wide.interval[1] > 0.2
    with pytest.raises(InputError, match=r"pruned must have answered the same 100 items; got 1"):
        choice_difference(dense, answers([True]))


def test_bootstrap_interval_is_about_that_of_the_normal_law() -> None:
    values = torch.tensor([1.0] * 80 + [0.0] * 120)
    low, high = bootstrap(values)
    spread = 1.96 * (0.4 * 0.6 / 200) ** 0.5
    assert low == pytest.approx(0.4 - spread, abs=0.01) and high == pytest.approx(0.4 + spread, abs=0.01)
    assert bootstrap(values) == (low, high)


def test_a_real_text_has_items(tokenizer: Any, tiny: Callable[..., Any]) -> None:
    items = choice_items(default_text()[:30_000], tokenizer, 20, 12, 4)
    seen: list[int] = []
    found = choice_accuracy(tiny("llama", vocab_size=1024), items, lambda stage, done, total: seen.append(done))
    assert found.interval[0] <= found.accuracy <= found.interval[1]
    assert seen[-1] == 20


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
        choice_items(tokenizer=Letters(), **{**given, **arguments})


def test_bad_items(tiny: Callable[..., Any]) -> None:
    model, items = tiny("llama"), choice_items(COUNTING, Letters(), 4, 7, 5)
    with pytest.raises(InputError, match="items must be at least one"):
        choice_accuracy(model, [])
    with pytest.raises(InputError, match="all of one size"):
        choice_accuracy(model, [*items, *choice_items(COUNTING, Letters(), 1, 8, 5)])
    with pytest.raises(InputError, match="windows of at most 64 tokens"):
        choice_accuracy(model, choice_items(COUNTING, Letters(), 1, 60, 5))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="model must give probabilities"):
        choice_accuracy(model, items)
