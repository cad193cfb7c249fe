"""Perplexity and generation against what can be worked out another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyprune import InputError
from pyprune.evaluation import generate_text, perplexity


def test_perplexity_is_that_of_the_models_own_loss(tiny: Callable[..., Any], ids: torch.Tensor) -> None:
    model = tiny("llama")
    losses = [model(input_ids=row[None], labels=row[None]).loss.detach().double() for row in ids]
    found = perplexity(model, ids)
    assert found.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert (found.tokens, found.predicted, found.window) == (64, 60, 16)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(
    tiny: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, ids).perplexity == pytest.approx(128, rel=1e-6)


def test_windows_longer_than_the_context_are_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"windows of at most 64 tokens .*; got 65"):
        perplexity(tiny("llama"), torch.zeros(1, 65, dtype=torch.int64))


def test_perplexity_of_logits_that_are_no_numbers_is_refused(tiny: Callable[..., Any], ids: torch.Tensor) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="model must give numbers for logits on this text; got 'NaN'"):
        perplexity(model, ids)


def test_greedy_generation_is_the_argmax(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    prompt = "The list"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = []
    with torch.no_grad():
        for _ in range(5):
            token = model(input_ids=ids).logits[:, -1:].argmax(-1)
            if token.item() == 2:
                break
            wanted.append(token.item())
            ids = torch.cat([ids, token], dim=1)
    assert generate_text(model, tokenizer, prompt, 5) == tokenizer.decode(wanted, skip_special_tokens=True)


def test_sampling_repeats_with_its_seed(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    texts = [generate_text(model, tokenizer, "The list", 16, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt must not be empty"),
        ({"new_tokens": 0}, "new_tokens must be at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"chat": True}, "chat must be used with a tokenizer that has a chat template"),
    ],
)
def test_bad_input(tiny: Callable[..., Any], tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_text(tiny("llama", vocab_size=1024), tokenizer, **{"prompt": "x", **arguments})
