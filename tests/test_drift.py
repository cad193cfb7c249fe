"""Generation drift of tiny models: none between equals, and what is known where they differ."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import InputError, prune
from pyprune.evaluation import likeness
from pyprune.evaluation.analysis import generation_drift
from pyprune.evaluation.analysis.deviation import probability_deviation
from pyprune.model.decode import decode, end_tokens

Tiny = Callable[..., Any]


@pytest.fixture
def prompts() -> list[Tensor]:
    return list(torch.randint(3, 128, (6, 8), generator=torch.Generator().manual_seed(7)))


def pruned_of(model: Any, keep: float = 0.7) -> Any:
    pruned = copy.deepcopy(model)
    prune(pruned, keep=keep, method="random", allocation="uniform:multiple=1", repair=None)
    return pruned


def endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def test_greedy_is_what_generate_gives(tiny: Tiny, prompts: list[Tensor]) -> None:
    model = endless(tiny("gpt2"))
    mixed = [*prompts, prompts[0][:5]]
    expected = [
        model.generate(p[None], attention_mask=torch.ones(1, len(p)), max_new_tokens=7, do_sample=False, pad_token_id=0)
        for p in mixed
    ]
    found = decode(model, mixed, 7)
    assert all(torch.equal(f, e[0, len(p) :]) for f, e, p in zip(found, expected, mixed, strict=True))


def test_texts_end_with_the_end_token(tiny: Tiny, prompts: list[Tensor]) -> None:
    model = endless(tiny("llama"))
    third = int(decode(model, prompts, 6)[0][2])
    model.generation_config.eos_token_id = [third]
    assert end_tokens(model) == [third]
    found = decode(model, prompts, 6)[0]
    assert len(found) <= 3 and int(found[-1]) == third


def test_common_random_numbers(tiny: Tiny, prompts: list[Tensor]) -> None:
    model = endless(tiny("llama"))
    runs = [decode(m, prompts, 12, 1.0, seed=3) for m in (model, copy.deepcopy(model))]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = decode(model, prompts, 12, 1.0, seed=40)
    assert any(not torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    rows = {tuple(decode(model, [prompts[0]] * 4, 12, 1.0)[i].tolist()) for i in range(4)}
    assert len(rows) == 4, "the same prompt four times draws four times"


def test_samples_have_the_models_distribution(tiny: Tiny) -> None:
    """Gumbel-max draws softmax(logits / T): counts of 4000 first tokens against their expectation, five sigma."""
    model = endless(tiny("llama"))
    prompt, count, temperature = torch.tensor([5, 6, 7]), 4000, 0.7
    with torch.no_grad():
        p = (model(input_ids=prompt[None]).logits[0, -1].double() / temperature).softmax(0)
    drawn = torch.cat(decode(model, [prompt] * count, 1, temperature))
    counts = drawn.bincount(minlength=len(p)).double()
    assert bool(((counts - count * p).abs() <= 5 * (count * p * (1 - p)).sqrt() + 1).all())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_identical_models_never_part(tiny: Tiny, family: str, prompts: list[Tensor], temperature: float) -> None:
    model = tiny(family)
    found = generation_drift(model, copy.deepcopy(model), prompts[:2], 5, temperature)
    assert found.median_divergence is None and all(entry["mean"] == 1 for entry in found.survival)
    for entry in found.steps:
        if entry["own"]["count"]:
            own = {name: entry["own"][name]["mean"] for name in ("embedding", "logits", "probabilities", "kl", "top1")}
            assert own == {"embedding": 0, "logits": 0, "probabilities": 0, "kl": 0, "top1": 1}
    assert found.agreement["edit"]["mean"] == 0 and found.agreement["overlap4"]["mean"] == 1
    assert found.exposure["kl"]["mean"] == 0
    assert found.dense == found.pruned and found.repetition_difference["mean"] == 0


def test_against_the_models_themselves(tiny: Tiny, prompts: list[Tensor]) -> None:
    dense = endless(tiny("llama"))
    pruned = pruned_of(dense)
    steps = 12
    found = generation_drift(dense, pruned, prompts, steps, seed=1)
    a, b = decode(dense, prompts, steps), decode(pruned, prompts, steps)
    assert [e["dense"] for e in found.examples] == [t.tolist() for t in a[:3]]
    parted = [likeness.divergence(x.tolist(), y.tolist()) for x, y in zip(a, b, strict=True)]
    for t, entry in enumerate(found.survival, 1):
        assert entry["mean"] == pytest.approx(sum(p is None or p > t for p in parted) / len(parted))
    step = 9

    def logits(model: Any, texts: list[Tensor]) -> Tensor:
        with torch.no_grad():
            rows = [
                model(input_ids=torch.cat([p, t[: step - 1]])[None]).logits[0, -1]
                for p, t in zip(prompts, texts, strict=True)
            ]
        return torch.stack(rows)

    cases = {
        "own": (logits(dense, a), logits(pruned, b)),
        "fixed": (logits(dense, a), logits(pruned, a)),
        "local": (logits(dense, b), logits(pruned, b)),
    }
    for name, pair in cases.items():
        expected = probability_deviation(*pair)
        for measure in ("kl", "total_variation", "top1"):
            mean = found.steps[step - 1][name][measure]["mean"]
            assert mean == pytest.approx(float(expected[measure].mean()), rel=1e-3)
    assert found.steps[0]["own"] == found.steps[0]["fixed"] == found.steps[0]["local"], (
        "at the first step both histories are the prompt"
    )
    assert min(p or 99 for p in parted) < step, "the test needs texts that part before that step"
    assert found.accumulated["kl"]["mean"] != 0
    means = [sum(entry[name]["kl"]["mean"] for entry in found.steps) / steps for name in ("local", "fixed")]
    assert found.exposure["kl"]["mean"] == pytest.approx(means[0] - means[1])
    assert json.loads(json.dumps(found.to_json()))["prompts"] == 6


def test_steps_after_the_end_are_not_counted(tiny: Tiny, prompts: list[Tensor]) -> None:
    dense = endless(tiny("llama"))
    pruned = pruned_of(dense)
    end = int(decode(dense, prompts, 3)[0][2])
    for model in (dense, pruned):
        model.generation_config.eos_token_id = end
    found = generation_drift(dense, pruned, prompts[:1], 10)
    length = int(found.dense["length"])
    assert length <= 3
    counts = [entry["fixed"]["count"] for entry in found.steps]
    assert counts == [1] * length + [0] * (10 - length)
    assert found.steps[-1]["fixed"]["kl"] == {"mean": None, "interval": None}


def test_bad_input(tiny: Tiny, prompts: list[Tensor]) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match=r"prompt 1 must have at most 54 tokens: 64 of context .* less 10 new ones"):
        generation_drift(model, model, [prompts[0], torch.ones(55, dtype=torch.long)], 10)
    with pytest.raises(InputError, match="prompts must be at least one; got 0"):
        generation_drift(model, model, [], 10)
    with pytest.raises(InputError, match=r"prompts must be .P. token ids, none empty; these are not; got .1."):
        generation_drift(model, model, [prompts[0], prompts[0][:0]], 10)
    with pytest.raises(InputError, match="new_tokens must be a positive integer; got 0"):
        generation_drift(model, model, prompts, 0)
    with pytest.raises(InputError, match="temperature must be 0 or more, and finite; got -1"):
        generation_drift(model, model, prompts, 4, temperature=-1)
    with pytest.raises(InputError, match="pruned must have the vocab_size of dense, 128; got 256"):
        generation_drift(model, tiny("llama", vocab_size=256), prompts, 4)
