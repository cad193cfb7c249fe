"""Answer tokens: prompts as they are shown, the tokens that follow them, and deviations with known values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from task_cases import Bigrams, Letters, Words

from pyprune import InputError
from pyprune.evaluation.analysis.deviation import probability_deviation
from pyprune.evaluation.tasks import ChoiceRecord, categorical
from pyprune.evaluation.tasks.categorical import DEVIATIONS, answer_tokens, presented

CAPITAL = ChoiceRecord("The capital of France is", ("Rome", "Paris", "Oslo"), 1)
QUESTION = ChoiceRecord("Is Rome in Peru?", ("yes", "no"), 1)


def test_prompts_as_they_are_shown() -> None:
    assert presented(CAPITAL) == (
        "Question: The capital of France is\nA. Rome\nB. Paris\nC. Oslo\nAnswer:",
        ("A", "B", "C"),
    )
    assert presented(QUESTION) == ("Question: Is Rome in Peru? Answer yes or no.\nAnswer:", ("yes", "no"))
    passage = ChoiceRecord("Is it?", ("True", "False"), 0, "A passage.")
    assert presented(passage) == ("A passage.\n\nQuestion: Is it? Answer True or False.\nAnswer:", ("True", "False"))
    with pytest.raises(InputError, match="choices must be at most 26, one a letter; got 27"):
        presented(ChoiceRecord("x", tuple(map(str, range(27))), 0))


def test_answers_must_be_one_token_each() -> None:
    words = Words()
    prompt, tokens = answer_tokens(words, *presented(QUESTION))
    assert words.decode(list(prompt)) == presented(QUESTION)[0]
    assert [words.decode([t]) for t in tokens] == [" yes", " no"]
    with pytest.raises(InputError, match=r"answer 'A' must be one token after the prompt; .* makes it \[32, 65\]"):
        answer_tokens(Letters(), *presented(CAPITAL))
    with pytest.raises(InputError, match="answers must be different tokens"):
        answer_tokens(words, "x", ("yes", "yes"))


def constant(logits: torch.Tensor) -> Bigrams:
    """A model that gives these logits everywhere."""
    return Bigrams(logits.repeat(len(logits), 1))


def test_probabilities_of_two_answers_by_hand() -> None:
    words = Words()
    _, (yes, no) = answer_tokens(words, *presented(QUESTION))
    other = ChoiceRecord("Is Lima in Peru?", ("yes", "no"), 0)
    answer_tokens(words, *presented(other))
    vocabulary = 64
    # Dense: yes 0.2, no 0.1 of all; pruned: yes 0.1, no 0.3. Restricted: 2/3, 1/3 and 1/4, 3/4.
    p, q = (torch.full((vocabulary,), rest / (vocabulary - 2), dtype=torch.float64) for rest in (0.7, 0.6))
    p[yes], p[no], q[yes], q[no] = 0.2, 0.1, 0.1, 0.3
    found = categorical(constant(p.log()), constant(q.log()), words, [QUESTION, other], shown=1, top=2)
    assert found.dense["accuracy"].tolist() == [0, 1] and found.pruned["accuracy"].tolist() == [1, 0]
    assert found.dense["mass"].tolist() == pytest.approx([0.3, 0.3])
    assert found.pruned["mass"].tolist() == pytest.approx([0.4, 0.4])
    kl = 2 / 3 * math.log((2 / 3) / (1 / 4)) + 1 / 3 * math.log((1 / 3) / (3 / 4))
    assert found.restricted["kl"].tolist() == pytest.approx([kl, kl])
    assert found.restricted["total_variation"].tolist() == pytest.approx([5 / 12, 5 / 12])
    cosine = (2 / 3 * 1 / 4 + 1 / 3 * 3 / 4) / math.sqrt((4 / 9 + 1 / 9) * (1 / 16 + 9 / 16))
    assert found.restricted["cosine"].tolist() == pytest.approx([1 - cosine] * 2)
    assert found.restricted["top1"].tolist() == found.full["top1"].tolist() == [0, 0]
    full = 0.2 * math.log(2) + 0.1 * math.log(1 / 3) + 0.7 * math.log(0.7 / 0.6)
    assert found.full["kl"].tolist() == pytest.approx([full, full])
    (top,) = found.top
    assert (top.prompt, top.answer) == (presented(QUESTION)[0], "no")
    assert top.dense == ((" yes", pytest.approx(0.2)), (" no", pytest.approx(0.1)))
    assert top.pruned[0] == (" no", pytest.approx(0.3))
    report = found.to_json()
    assert report["deviations"]["restricted"]["kl"]["mean"] == pytest.approx(kl)
    assert report["deviations"]["full"]["kl"]["interval"] == pytest.approx([full, full])
    assert report["top"][0]["dense"][0][0] == " yes"


def test_the_same_model_deviates_by_exactly_nothing(tiny: Callable[..., Any]) -> None:
    words = Words()
    model = tiny("llama")
    found = categorical(model, model, words, [QUESTION, CAPITAL])
    for space in (found.restricted, found.full):
        assert tuple(space) == DEVIATIONS
        assert {n: v.tolist() for n, v in space.items()} == {n: [float(n == "top1")] * 2 for n in DEVIATIONS}
    alone = categorical(model, None, words, [QUESTION, CAPITAL])
    assert alone.dense["mass"].tolist() == found.dense["mass"].tolist()
    assert not alone.pruned and not alone.restricted and not alone.to_json()["deviations"]


def test_many_items_are_what_single_ones_are(tiny: Callable[..., Any]) -> None:
    """Prompts of different lengths in one batch, and the full vocabulary at the position of the answer."""
    words, dense, pruned = Words(), tiny("gpt2"), tiny("gpt2", seed=1)
    records = [CAPITAL, QUESTION, ChoiceRecord("One", ("a", "b", "c", "d"), 3), ChoiceRecord("No?", ("no", "yes"), 0)]
    found = categorical(dense, pruned, words, records * 3)
    for i, record in enumerate(records):
        prompt, tokens = answer_tokens(words, *presented(record))
        with torch.no_grad():
            both = [m(input_ids=torch.tensor([prompt])).logits[:, -1] for m in (dense, pruned)]
        wanted = probability_deviation(*(logits[:, list(tokens)] for logits in both))
        whole = probability_deviation(*both)
        for at in (i, i + 4, i + 8):
            assert float(found.restricted["kl"][at]) == pytest.approx(float(wanted["kl"]), rel=1e-3, abs=1e-6)
            assert float(found.full["js"][at]) == pytest.approx(float(whole["js"]), rel=1e-3, abs=1e-6)
            right = int(both[1][0, list(tokens)].argmax()) == record.answer
            assert found.pruned["accuracy"][at] == right


def test_solved_records_stand_in_front(tiny: Callable[..., Any]) -> None:
    """Other records than the one that is asked, with answers that take turns, in an order that the seed gives."""
    words, model = Words(), tiny("llama", vocab_size=512, max_position_embeddings=256)
    records = [ChoiceRecord(f"Is it {i}?", ("yes", "no"), i % 2) for i in range(6)]
    found = categorical(model, None, words, records, shots=2, shown=6)
    for i, top in enumerate(found.top):
        *solved, asked = top.prompt.split("\n\n")
        assert asked == presented(records[i])[0] and len(solved) == 2
        known = {f"{presented(r)[0]} {r.choices[r.answer]}": r for r in records}
        assert [known[text].answer for text in solved] == [0, 1] and records[i] not in [known[t] for t in solved]
    prompts, again, other = (
        [top.prompt for top in categorical(model, None, words, records, shots=2, shown=6, seed=seed).top]
        for seed in (0, 0, 1)
    )
    assert prompts == again != other
    with pytest.raises(InputError, match="shots must be from 0 to 5, one less than the records; got 6"):
        categorical(model, None, words, records, shots=6)


def test_bad_input(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="records must be at least one; got 0"):
        categorical(tiny("llama"), None, Words(), [])
    with pytest.raises(InputError, match="records must have windows of at most 64 tokens"):
        categorical(tiny("llama"), None, Words(), [ChoiceRecord("word " * 60, ("a", "b"), 0)])
