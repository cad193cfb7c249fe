"""Greedy continuations of two models, compared: counted by hand, and with models that agree or never do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pyprune import InputError
from pyprune.evaluation import generation_deltas, perplexity
from pyprune.evaluation.agreement import common_start, repetition
from pyprune.model.decode import decode

PROMPTS = ("The list", "A class is", "When the call returns,")


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    # 1234 2341 3412 4123 1234: one of five is not new
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 1, 2], order=2) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [([1, 2, 3], [1, 2, 4], 2), ([5], [6], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 2], 9)],
)
def test_common_start_by_hand(a: list[int], b: list[int], same: int) -> None:
    assert common_start(a, b, 9) == common_start(b, a, 9) == same


def test_identical_models_agree_fully(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    found = generation_deltas(model, copy.deepcopy(model), tokenizer, PROMPTS, 20)
    assert found.agree == {1: 1.0, 4: 1.0, 16: 1.0, 20: 1.0}
    assert found.divergence == 20 and found.dense == found.pruned
    assert found.to_json()["dense"]["tokens"] == found.dense.tokens <= 60


def _starts(tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]


def _forget(model: Any, token: int) -> Any:
    """A copy that gives `token` always."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(1024).index_fill(0, torch.tensor([token]), 5.0))
    return model


def test_a_model_that_says_one_word_never_agrees(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    said = [text.tolist() for text in decode(model, _starts(tokenizer, PROMPTS), 10)]
    unsaid = next(t for t in range(3, 1024) if not any(t in one for one in said))
    found = generation_deltas(model, _forget(model, unsaid), tokenizer, PROMPTS, 10)
    assert found.agree == {1: 0.0, 4: 0.0, 10: 0.0} and found.divergence == 0
    # 7 four-grams, one of them new; 3 * 9 bigrams, all the same
    assert found.pruned.repetition == pytest.approx(6 / 7)
    assert found.pruned.distinct2 == pytest.approx(1 / 27)
    assert found.pruned.tokens == 30 and found.pruned.perplexity > found.dense.perplexity


def test_half_agrees(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """The word one model always says is the one that the other says first."""
    model = tiny("llama", vocab_size=1024)
    said = [text.tolist() for text in decode(model, _starts(tokenizer, PROMPTS), 6)]
    token = said[0][0]
    found = generation_deltas(model, _forget(model, token), tokenizer, PROMPTS, 6)
    same = [common_start(one, [token] * 6, 6) for one in said]
    assert same[0] >= 1 and found.agree[1] == pytest.approx(sum(n >= 1 for n in same) / 3)
    assert found.divergence == pytest.approx(sum(same) / 3)


def test_perplexity_of_a_continuation_is_the_dense_models(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """With a prompt of one token, it is that of the whole window."""
    model = tiny("llama", vocab_size=1024)
    prompt = next(t for t in ("a", "e", "x") if len(tokenizer(t)["input_ids"]) == 1)
    (start,) = _starts(tokenizer, [prompt])
    (text,) = decode(model, [start], 8)
    found = generation_deltas(model, model, tokenizer, [prompt], 8)
    assert found.dense.perplexity == pytest.approx(perplexity(model, torch.cat([start, text])[None]).perplexity)


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [
        ([], 4, "prompts must be some, none of them empty; got 0"),
        (["x", " "], 4, "prompts must be some"),
        (["x"], 0, "new_tokens must be at least 1; got 0"),
    ],
)
def test_bad_input(tiny: Callable[..., Any], tokenizer: Any, prompts: list[str], new_tokens: int, message: str) -> None:
    model = tiny("llama", vocab_size=1024)
    with pytest.raises(InputError, match=message):
        generation_deltas(model, model, tokenizer, prompts, new_tokens)


@pytest.mark.parametrize(
    "own",
    [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"suppress_tokens": [*range(3, 128)]}],
)
def test_a_checkpoints_own_penalties_bend_nothing(own: dict[str, Any], tiny: Callable[..., Any]) -> None:
    """Greedy is the likeliest token, by hand, and the model's generation config is there again afterwards."""
    model = tiny("llama")
    prompt = torch.tensor([5, 9, 9, 5])
    row = prompt
    for _ in range(12):
        row = torch.cat([row, model(row[None]).logits[0, -1].argmax()[None]])
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    (found,) = decode(model, [prompt], 12)
    assert found.tolist() == row[4 : 4 + len(found)].tolist() and model.generation_config is kept
