"""Choice, generation and retrieval: scores worked out by hand, and batches against single runs of real models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from task_cases import Bigrams, Letters, Marked, Merging, Says
from torch import nn

from pyprune import InputError
from pyprune.base.text import default_text
from pyprune.base.windows import start_ids
from pyprune.evaluation import generate_text
from pyprune.evaluation.tasks import (
    ChoiceRecord,
    GenerationRecord,
    RetrievalRecord,
    choice_correct,
    embeddings,
    generation_scores,
    option_scores,
    pairs_from_text,
    retrieval_scores,
)
from pyprune.evaluation.tasks.choice import chance, option_deviations
from pyprune.evaluation.tasks.encoding import joined_ids, prompt_ids
from pyprune.evaluation.tasks.generation import _written_lines, first_line, judge, words, written
from pyprune.evaluation.tasks.retrieval import chances, ranks


def codes(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_prompt_and_answer_are_joined_by_one_space() -> None:
    assert joined_ids(Letters(), "ab", "c") == (codes("ab"), codes(" c"))
    assert joined_ids(Letters(), "ab ", "c") == (codes("ab "), codes("c"))
    assert joined_ids(Letters(), "ab", "\nc") == (codes("ab"), codes("\nc"))


def test_tokens_that_merge_across_the_seam_are_encoded_apart() -> None:
    assert joined_ids(Merging(), "a", "b") == (codes("a"), (127,))
    assert joined_ids(Merging(), "a ", "b") == (codes("a "), codes("b"))


def test_the_start_of_a_text_is_kept_and_its_end_is_not() -> None:
    assert start_ids(Marked()) == [1] and start_ids(Letters()) == []
    assert prompt_ids(Marked(), "ab") == (1, *codes("ab"))
    assert joined_ids(Marked(), "a", "b") == ((1, *codes("a")), codes(" b"))


def bigrams(probabilities: dict[str, dict[str, float]], size: int = 256) -> Bigrams:
    """A model with these probabilities of a character after another; all others share what is left."""
    table = torch.zeros(size, size, dtype=torch.float64)
    for last, following in probabilities.items():
        row = torch.full((size,), (1 - sum(following.values())) / (size - len(following)), dtype=torch.float64)
        for character, probability in following.items():
            row[ord(character)] = probability
        table[ord(last)] = row.log()
    return Bigrams(table)


def test_options_of_different_lengths_are_scored_in_three_ways() -> None:
    # "ccc": 0.2 * 0.9 * 0.9 = 0.162; "b": 0.3; "é": 0.25, of two bytes; the space before them: 0.5.
    model = bigrams({"x": {" ": 0.5}, " ": {"b": 0.3, "c": 0.2, "é": 0.25}, "c": {"c": 0.9}})
    records = [
        ChoiceRecord("x", ("b", "ccc"), 0),
        ChoiceRecord("some text before x", ("é", "b"), 1),
        ChoiceRecord("x", ("ccc", "b", "é"), 0),
    ]
    found = option_scores(model, Letters(), records)
    assert found[0].log_likelihood.exp().tolist() == pytest.approx([0.15, 0.081])
    assert found[1].log_likelihood.exp().tolist() == pytest.approx([0.125, 0.15])
    assert (found[0].tokens.tolist(), found[0].size.tolist()) == ([2, 4], [1, 3])
    assert (found[1].tokens.tolist(), found[1].size.tolist()) == ([2, 2], [2, 1])
    # log 0.15 / 2 < log 0.081 / 4, and log 0.15 < log 0.081 / 3; log 0.125 / 2 > log 0.15.
    assert [f.answers() for f in found] == [(0, 1, 1), (1, 1, 0), (1, 0, 0)]
    correct = choice_correct(model, Letters(), records)
    assert {name: values.tolist() for name, values in correct.items()} == {
        "accuracy": [1, 1, 0],
        "accuracy_token": [0, 1, 1],
        "accuracy_byte": [0, 0, 1],
    }
    assert chance(records) == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_options_are_a_subspace_beside_the_whole_vocabulary() -> None:
    """A model that halves every option alike, and gives the rest to a token that is none, moves nothing among them."""
    dense = bigrams({"x": {" ": 0.9}, " ": {"b": 0.54, "c": 0.18, "d": 0.18}})
    halved = bigrams({"x": {" ": 0.9}, " ": {"b": 0.27, "c": 0.09, "d": 0.09, "e": 0.5}})
    shifted = bigrams({"x": {" ": 0.4, "y": 0.5}, " ": {"b": 0.18, "c": 0.54, "d": 0.18}})
    records = [ChoiceRecord("x", ("b", "c"), 0), ChoiceRecord("of more tokens x", ("d", "b", "c"), 1)]

    def found(pruned: Bigrams) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        scores = option_scores(dense, Letters(), records), option_scores(pruned, Letters(), records)
        return option_deviations(dense, pruned, Letters(), records, scores)

    few, every = found(dense)
    assert all(torch.equal(v, torch.full_like(v, name == "top1")) for name, v in {**few, **every}.items())
    few, every = found(halved)
    assert few["total_variation"].tolist() == pytest.approx([0, 0], abs=1e-6)
    # The option begins with its space, which halved says as dense does.
    assert every["total_variation"].tolist() == pytest.approx([0, 0], abs=1e-6)
    few, every = found(shifted)
    # 0.75 and 0.25 of two options become 0.25 and 0.75; of three 0.6, 0.2, 0.2 become 0.2, 0.6, 0.2.
    assert few["total_variation"].tolist() == pytest.approx([0.5, 0.4])
    assert few["top1"].tolist() == [0, 0] and every["total_variation"].tolist() == pytest.approx([0.5, 0.5], abs=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "lfm2", "gemma2"])
def test_batches_of_options_are_single_runs(tiny: Callable[..., Any], tokenizer: Any, family: str) -> None:
    model = tiny(family, vocab_size=1024)
    records = [
        ChoiceRecord("The list", ("is empty", "holds"), 0),
        ChoiceRecord("A", ("class defines", "b", "c d e"), 1),
    ]
    for record, scores in zip(records, option_scores(model, tokenizer, records), strict=True):
        for option, score in zip(record.choices, scores.log_likelihood, strict=True):
            prompt, rest = joined_ids(tokenizer, record.prompt, option)
            ids = torch.tensor([[*prompt, *rest]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            wanted = logits.double().log_softmax(-1)[range(len(rest)), list(rest)].sum()
            assert float(score) == pytest.approx(float(wanted), rel=1e-4)


def test_text_is_judged_by_words() -> None:
    assert words("The  Eiffel-Tower, in PARIS!") == ["eiffel", "tower", "in", "paris"]
    assert words("A") == ["a"] and words("...") == []
    assert first_line("\n\n Paris.\nThe capital") == "Paris." and first_line("\n \n") == ""
    assert judge("Paris.", ["Paris"]) == (1, 1, 1)
    assert judge("the city of Paris", ["Rome", "Paris"]) == (0, 1, pytest.approx(2 / 4))
    assert judge("Parisian", ["Paris"]) == (0, 0, 0)
    assert judge("South", ["South America"]) == (0, 0, pytest.approx(2 / 3))
    assert judge("America South", ["South America"]) == (0, 0, 1)
    assert judge("", ["x"]) == (0, 0, 0)
    assert judge("a", ["an"]) == (0, 0, 0)


def test_generation_is_scored_on_its_first_line() -> None:
    records = [
        GenerationRecord("x", ("Rome",)),
        GenerationRecord("yy", ("Rome",), "c"),
        GenerationRecord("z", ("Rome",)),
    ]
    model = Says({"x": "Rome.\nParis", "c\nyy": "in Rome", "z": "Paris\nRome"})
    found = generation_scores(model, Letters(), records)
    assert found["exact"].tolist() == [1, 0, 0]
    assert found["contains"].tolist() == [1, 1, 0]
    assert found["f1"].tolist() == pytest.approx([1, 2 / 3, 0])
    assert written(model, Letters(), records, 3) == ["Rom", "in ", "Par"]


def test_batches_of_prompts_are_single_runs(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    # What a checkpoint may bring along changes nothing.
    model.generation_config.repetition_penalty = 5.0
    prompts = ["The list", "The class", "An object is a thing that", "x"]
    found = written(model, tokenizer, [GenerationRecord(p, ("y",)) for p in prompts], 6)
    model.generation_config.repetition_penalty = 1.0
    whole = [generate_text(model, tokenizer, p, 6) for p in prompts]
    assert len(set(whole)) > 1
    assert [first_line(text) for text in found] == [first_line(text) for text in whole]
    assert all(text.startswith(start) for text, start in zip(whole, found, strict=True))


def test_writing_stops_at_the_end_of_the_first_line() -> None:
    rows = torch.tensor([[9, *codes(text)] for text in ("abc\n", "\n\n  ", "\na\nb", "abcd")])
    assert _written_lines(Letters(), 1, rows, None).tolist() == [True, False, True, False]


def test_ranks_by_hand() -> None:
    documents = torch.eye(3)
    queries = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.2], [0.3, 0.2, 0.1]])
    assert ranks(queries, documents, centred=False).tolist() == [1, 2, 3]
    # The same offset on every document and on every query is no difference between them.
    assert ranks(torch.eye(3) + 50, documents + torch.tensor([9.0, 1.0, 30.0])).tolist() == [1, 1, 1]
    assert ranks(torch.ones(4, 2), torch.ones(4, 2), centred=False).tolist() == [4, 4, 4, 4]
    assert ranks(torch.ones(4, 2), torch.ones(4, 2)).tolist() == [4, 4, 4, 4]
    assert chances(2) == {"accuracy_at_1": 0.5, "mrr": 0.75}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_embeddings_are_means_of_hidden_states(tiny: Callable[..., Any], tokenizer: Any, family: str) -> None:
    model = tiny(family, vocab_size=1024)
    texts = ["The list", "An object is a thing that has methods", "x"]
    last, first = embeddings(model, tokenizer, texts, (None, 0))
    assert torch.equal(embeddings(model, tokenizer, texts, (0,))[0], first)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), "a hook stayed"
    for i, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        assert torch.allclose(last[i], states[-1][0].double().mean(0), atol=1e-5)
        units = states[1][0].double() / states[1][0].double().norm(dim=1, keepdim=True)
        assert torch.allclose(first[i], units.mean(0), atol=1e-5)


def test_retrieval_of_the_same_text_and_of_nothing(tiny: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=1024)
    texts = ["The list", "An object is a thing", "x", "A class defines"]
    (found,) = retrieval_scores(model, tokenizer, [RetrievalRecord(t, t) for t in texts])
    assert found["accuracy_at_1"].tolist() == found["mrr"].tolist() == [1, 1, 1, 1]
    with torch.no_grad():
        model.model.norm.weight.zero_()
    (found,) = retrieval_scores(model, tokenizer, [RetrievalRecord(t, t) for t in texts])
    assert found["accuracy_at_1"].tolist() == [0] * 4 and found["mrr"].tolist() == [0.25] * 4


def test_pairs_from_text_are_halves_of_paragraphs() -> None:
    text = "one two three four five\n\ntoo short\n  \nsix seven eight nine\nten\n\none two three four five"
    assert pairs_from_text(text, 2, 4) == (
        RetrievalRecord("one two", "three four five"),
        RetrievalRecord("six seven", "eight nine ten"),
    )
    found, again, other = (pairs_from_text(default_text(), 40, seed=seed) for seed in (0, 0, 1))
    assert found == again != other and len({p.query for p in found}) == 40
    with pytest.raises(InputError, match="text must have 3 paragraphs of at least 4 words; got 2"):
        pairs_from_text(text, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: option_scores(m, t, []), "records must be at least one; got 0"),
        (lambda m, t: written(m, t, [GenerationRecord("a", ("b",))], 0), "new_tokens must be at least 1; got 0"),
        (lambda m, t: retrieval_scores(m, t, [RetrievalRecord("a", "b")]), "records must be at least 2"),
        (lambda m, t: embeddings(m, t, ["a"], (3,)), "layer must be from 0 to 2, or None for the last state; got 3"),
        (lambda m, t: embeddings(m, t, ["a"], (None, -1)), "layer must be from 0 to 2"),
        (lambda m, t: embeddings(m, t, ["word " * 99]), r"texts must have windows of at most 64 tokens"),
        (lambda m, t: option_scores(m, t, [ChoiceRecord("word " * 99, ("a", "b"), 0)]), "records must have windows of"),
        (lambda m, t: written(m, t, [GenerationRecord("x", ("b",))], 64), "at most 64 tokens .*; got 65"),
    ],
)
def test_bad_input(tiny: Callable[..., Any], tokenizer: Any, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(tiny("llama", vocab_size=1024), tokenizer)


def test_a_token_beyond_the_vocabulary_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="tokenizer must give tokens below the model's vocabulary of 96; got 98"):
        option_scores(tiny("llama", vocab_size=96), Letters(), [ChoiceRecord("A", ("a", "b"), 0)])


def test_logits_that_are_no_numbers_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    assert isinstance(model.model.norm.weight, nn.Parameter)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="model must give finite logits on every prompt"):
        option_scores(model, Letters(), [ChoiceRecord("a", ("b", "c"), 0)])
    with pytest.raises(InputError, match="model must give finite hidden states on every text"):
        embeddings(model, Letters(), ["ab"])
