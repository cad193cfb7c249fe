"""The suite: what two models score, what was lost, and which way of asking suffers more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pyprune import InputError
from pyprune.evaluation.tasks import run_tasks, shipped
from pyprune.evaluation.tasks.estimates import Scores, metric, order


@pytest.fixture(scope="module")
def answering() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer to which letters and yes and no after a space are single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    facts = [shipped(name).read_text(encoding="utf-8") for name in ("choice", "yesno")]
    bpe.train_from_iterator([*facts, "Answer: A B C D yes no " * 400], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def test_a_metric_of_two_models_by_hand() -> None:
    dense, pruned = torch.tensor([1.0] * 80 + [0.0] * 20), torch.tensor([1.0] * 60 + [0.0] * 40)
    found = metric(dense, pruned, 0.25)
    assert found.pruned and found.difference and found.relative_loss and found.retained
    assert (found.dense.value, found.pruned.value) == pytest.approx((0.8, 0.6))
    assert found.difference.value == pytest.approx(0.2) and found.relative_loss.value == pytest.approx(0.25)
    assert found.retained.value == pytest.approx(0.35 / 0.55)
    # 20 of 100 pairs differ, by 1: the interval is that of the pairs, not of two samples.
    spread = 1.96 * math.sqrt(0.2 * 0.8 / 100)
    assert found.difference.interval == pytest.approx((0.2 - spread, 0.2 + spread), abs=0.015)
    assert found.retained.interval[0] < 0.35 / 0.55 < found.retained.interval[1] < 0.85
    assert json.loads(json.dumps(found.to_json()))["retained"]["value"] == pytest.approx(0.35 / 0.55)


def test_what_is_not_above_chance_retains_nothing() -> None:
    guess, none = torch.tensor([1.0] * 25 + [0.0] * 75), torch.zeros(100)
    found = metric(guess, none, 0.25)
    assert found.retained is None and found.relative_loss is not None and found.relative_loss.value == 1
    assert metric(none, none, 0.0).relative_loss is None
    alone = metric(guess, None, 0.25)
    assert alone.pruned is alone.difference is alone.retained is None and alone.dense.value == 0.25
    with pytest.raises(InputError, match="pruned must have the same 100 items"):
        metric(guess, none[:3], None)


def test_which_way_of_asking_suffers_more() -> None:
    ids = [f"fact/{i}" for i in range(100)]
    ones = torch.ones(100)
    # Choice falls from 1 to 0.85 with a chance of 0.25, that is to 0.8 of what it had; generation from 1 to 0.4.
    kept, lost = (torch.tensor([1.0] * n + [0.0] * (100 - n)) for n in (85, 40))
    choice, generation = Scores(ids, ones, kept, 0.25), Scores(ids, ones, lost, 0.0)
    found = order(choice, generation)
    assert found and found.facts == 100 and (found.first, found.second) == pytest.approx((0.8, 0.4))
    assert found.difference.value == pytest.approx(0.4) and found.verdict() == "second"
    turned = order(generation, choice)
    assert turned and turned.verdict() == "first" and turned.difference.value == pytest.approx(-0.4)
    same = order(generation, generation)
    assert same and same.difference.interval == (0.0, 0.0) and same.verdict() == "undecided"
    # The facts that both asked, wherever they stand: 45 of the last 60, (0.75 - 0.25) / 0.75.
    few = order(choice, Scores(ids[:39:-1], ones[:60], torch.zeros(60), 0.0))
    assert few and few.facts == 60 and (few.first, few.second) == pytest.approx((2 / 3, 0.0))
    assert order(choice, Scores([""] * 100, ones, lost, 0.0)) is None
    assert order(choice, Scores(ids, lost * 0, lost, 0.0)) is None


def test_all_tasks_that_ship(tiny: Callable[..., Any], answering: Any) -> None:
    dense, pruned = (tiny("llama", seed=s, vocab_size=512, max_position_embeddings=512) for s in (0, 1))
    seen: set[str] = set()
    report = run_tasks(dense, pruned, answering, items=24, progress=lambda stage, done, total: seen.add(stage))
    assert [(t.name, t.kind) for t in report.tasks] == [
        ("choice", "choice"),
        ("choice, letters", "categorical"),
        ("generation", "generation"),
        ("yesno", "categorical"),
        ("retrieval", "retrieval"),
    ]
    assert seen == {"multiple choice", "answer positions", "answer tokens", "generation", "embedding"}
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert all(task["items"] == 24 for task in values["tasks"])
    for task in values["tasks"]:
        assert task["main"] in task["metrics"]
        for found in task["metrics"].values():
            low, high = found["difference"]["interval"]
            assert low <= found["difference"]["value"] == found["dense"]["value"] - found["pruned"]["value"] <= high
    letters = values["tasks"][1]
    assert letters["metrics"]["accuracy"]["chance"] == 0.25 and letters["metrics"]["mass"]["chance"] is None
    for task in (values["tasks"][0], letters):
        assert task["deviations"]["restricted"]["kl"]["mean"] > 0 and task["deviations"]["full"]["kl"]["mean"] > 0
    few, again, shown = (
        run_tasks(dense, pruned, answering, [shipped("yesno")], 6, shots=s).to_json() for s in (0, 0, 1)
    )
    assert few == again != shown and shown["shots"] == 1


def test_a_model_beside_itself_loses_nothing(tiny: Callable[..., Any], answering: Any, tmp_path: Path) -> None:
    model = tiny("gpt2", vocab_size=512, n_positions=128)
    # The model's own first token is the answer, so that it is right, and above chance, everywhere.
    lines = [f"Fact {i} is" for i in range(6)]
    answers = []
    for line in lines:
        with torch.no_grad():
            likely = model(**answering(line, return_tensors="pt")).logits[0, -1].argsort(descending=True)
        whole = [answering.decode([int(t)]) for t in likely]
        answers.append(next(w.strip() for w in whole if w.startswith(" ") and w.strip().isalpha()))
    entries = [
        {"id": line, "prompt": line, "choices": [answer, "zzzzzzzz qqqqqq"], "answer": 0}
        for line, answer in zip(lines, answers, strict=True)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in entries))
    (task, _) = run_tasks(model, model, answering, [file]).tasks
    found = task.metrics["accuracy"]
    assert found.dense.value == 1 and found.retained and found.difference
    assert (found.difference.value, found.difference.interval) == (0.0, (0.0, 0.0))
    assert (found.retained.value, found.retained.interval) == (1.0, (1.0, 1.0))
    alone = run_tasks(model, None, answering, [file])
    assert alone.tasks[0].metrics["accuracy"].dense == found.dense and not alone.orders
    assert alone.to_json()["tasks"][0]["metrics"]["accuracy"]["pruned"] is None


def test_bad_input(tiny: Callable[..., Any], answering: Any, tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=512)
    with pytest.raises(InputError, match="items must be at least 2, or None for all; got 1"):
        run_tasks(model, None, answering, items=1)
    with pytest.raises(InputError, match="pruned must have the dense model's vocabulary of 512; got 128"):
        run_tasks(model, tiny("llama"), answering)
    with pytest.raises(InputError, match="dense must be in eval mode"):
        run_tasks(tiny("llama").train(), None, answering)
    with pytest.raises(InputError, match=r"files must have different names, which are the tasks'; got \['a', 'a'\]"):
        run_tasks(model, None, answering, ["a.jsonl", "b/a.jsonl"])
    with pytest.raises(InputError, match="files must be at least one"):
        run_tasks(model, None, answering, [])
    with pytest.raises(InputError, match="task file must be an existing file"):
        run_tasks(model, None, answering, [shipped("choice"), tmp_path / "none.jsonl"])


def test_answers_of_several_tokens_are_skipped_and_said(tiny: Callable[..., Any], tokenizer: Any) -> None:
    """The tiny tokenizer has no token for ` yes`: choice by likelihood takes the place of the answer tokens."""
    model = tiny("llama", vocab_size=1024, max_position_embeddings=1024)
    found = run_tasks(model, model, tokenizer, items=4, seed=1).to_json()
    assert [entry["name"] for entry in found["skipped"]] == ["yesno"]
    assert "answer 'yes' must be one token after the prompt" in found["skipped"][0]["reason"]
    kinds = {task["name"]: task["kind"] for task in found["tasks"]}
    assert kinds["yesno"] == "choice" and kinds["choice, letters"] == "categorical"
