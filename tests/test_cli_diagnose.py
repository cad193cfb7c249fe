"""`pyprune diagnose` and `pyprune inspect --redundancy` on tiny checkpoints, as a user types them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import as_json, call, refused

from pyprune import prune
from pyprune.base.errors import InputError
from pyprune.evaluation.diagnose import Budget, prompts_of
from pyprune.model import checkpoint, loading

SMALL = ("--tokens", 512, "--window", 64, "--prompts", 3, "--prompt-tokens", 8, "--new-tokens", 5, "--items", 4)


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = loading.load_model(str(tiny_checkpoint))
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    folder = tmp_path_factory.mktemp("pruned") / "half"
    checkpoint.save(model, folder, loading.load_tokenizer(str(tiny_checkpoint)))
    return folder


def test_everything(tiny_checkpoint: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "diagnose.json"
    facts = as_json("diagnose", tiny_checkpoint, pruned, *SMALL, "--out", out)
    assert json.loads(out.read_text()) == facts
    assert facts["dense"] == "tiny-llama" and facts["pruned"] == "half" and str(tmp_path) not in json.dumps(facts)
    assert facts["hierarchy"]["windows"] == 8 and facts["hierarchy"]["perplexity"]["pruned"] > 1
    assert set(facts["drift"]) == {"greedy", "sampled"} and facts["drift"]["sampled"]["temperature"] == 1.0
    example = facts["drift"]["greedy"]["examples"][0]
    assert all(isinstance(example[name], str) for name in ("prompt", "dense", "pruned"))
    assert {task["kind"] for task in facts["tasks"]["tasks"]} >= {"choice", "generation", "retrieval", "categorical"}
    assert facts["provenance"]["config"]["keep"] == 0.5
    assert facts["parameters"]["pruned"] < facts["parameters"]["dense"]
    assert facts["memory"]["model_bytes"] == 4 * facts["parameters"]["dense"]


def test_what_people_see(tiny_checkpoint: Path, pruned: Path) -> None:
    shown = call("diagnose", tiny_checkpoint, pruned, *SMALL)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    for words in (
        "hidden states",
        "from logits to probabilities",
        "layers whose FFN differs most",
        "generation from the",
    ):
        assert words in text
    for words in (
        "no task: yesno",
        "tasks",
        "times the dense model",
        "token perplexity on pydoc_data.topics (second half)",
    ):
        assert words in text


def test_a_model_against_itself_has_lost_nothing(tiny_checkpoint: Path) -> None:
    facts = as_json("diagnose", tiny_checkpoint, tiny_checkpoint, *SMALL)
    assert facts["hierarchy"]["probabilities"]["kl"]["mean"] == 0.0
    assert facts["drift"]["greedy"]["median_divergence"] is None
    differences = [task["metrics"][task["main"]]["difference"]["value"] for task in facts["tasks"]["tasks"]]
    assert differences and not any(differences)


def test_parts_and_files_of_the_users_own(tiny_checkpoint: Path, pruned: Path, tmp_path: Path) -> None:
    prompts, tasks = tmp_path / "prompts.txt", tmp_path / "mine.jsonl"
    prompts.write_text("The list\n\nA class is a\n")
    tasks.write_text('{"prompt": "A list is", "choices": ["mutable", "blue"], "answer": 0}\n' * 3)
    given = ("--parts", "drift,tasks", "--prompts-file", prompts, "--task", tasks)
    size = ("--tokens", 512, "--window", 64, "--new-tokens", 5, "--items", 4)
    facts = as_json("diagnose", tiny_checkpoint, pruned, *size, *given)
    assert "hierarchy" not in facts and facts["drift"]["greedy"]["prompts"] == 2
    assert {task["name"].partition(",")[0] for task in facts["tasks"]["tasks"]} == {"mine"}


def test_what_is_refused(tiny_checkpoint: Path, pruned: Path, tmp_path: Path, tokenizer: Any) -> None:
    both = (tiny_checkpoint, pruned)
    assert "parts must be one of hierarchy, drift, tasks" in refused(2, "diagnose", *both, "--parts", "driift")
    assert "parts must be some of" in refused(2, "diagnose", *both, "--parts", ",")
    assert "prompts must be a positive integer; got 0" in refused(2, "diagnose", *both, "--prompts", 0)
    assert "temperature must be above 0" in refused(2, "diagnose", *both, "--temperature", 0)
    assert "items must be positive or None; got -1" in refused(2, "diagnose", *both, "--items", -1)
    few = ("--tokens", 64, "--window", 64, "--parts", "drift")
    assert "text must hold at least 768 tokens, for 24 prompts of 32; got 64" in refused(2, "diagnose", *both, *few)
    long = ("--prompt-tokens", 500, "--prompts", 1, "--window", 64, "--parts", "drift")
    assert "prompt 0 must have at most 464 tokens: 512 of context" in refused(2, "diagnose", *both, *long)
    late = "comparing representations"  # not before the arguments are known to do
    for wrong, message in (
        (("--task", tmp_path / "no"), "task file must be an existing file"),
        (("--items", 1), "items must be at least 2, or None for all; got 1"),
        (("--items", 2), "shots must be from 0 to 1, one less than the records of"),
        (("--out", tmp_path), "out must be a file"),
    ):
        assert message in refused(2, "diagnose", *both, *wrong) and late not in message
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    assert "prompts_file must have a line" in refused(2, "diagnose", *both, "--prompts-file", empty)
    assert "prompts_file must be an existing file" in refused(2, "diagnose", *both, "--prompts-file", tmp_path / "no")
    other = tmp_path / "other"
    model = loading.load_model(str(tiny_checkpoint))
    larger = copy.deepcopy(tokenizer)  # the fixture is every test's
    larger.add_tokens(["<new>"])
    checkpoint.save(model, other, larger)
    assert "pruned must have the other model's tokenizer; 1 tokens differ" in refused(
        2, "diagnose", tiny_checkpoint, other
    )


def test_prompts_by_hand() -> None:
    windows = torch.arange(24).view(4, 6)
    assert [p.tolist() for p in prompts_of(windows, 3, 2)] == [[0, 1], [8, 9], [16, 17]]
    with pytest.raises(InputError, match="text must hold at least 25 tokens, for 5 prompts of 5; got 24"):
        prompts_of(windows, 5, 5)
    assert Budget().prompts > 0


def test_redundancy(tiny_checkpoint: Path) -> None:
    given = ("--redundancy", "--tokens", 512, "--window", 64, "--criteria", "wanda,random", "--keep", 0.5)
    facts = as_json("inspect", tiny_checkpoint, *given)
    found = facts["redundancy"]
    assert set(found["after"]) == {"wanda", "random"} and found["keep"] == 0.5 and len(found["layers"]) == 3
    assert found["text"] == "pydoc_data.topics (first half)" and found["machine"]["versions"]["torch"]
    shown = call("inspect", tiny_checkpoint, *given)
    assert shown.exit_code == 0 and "what criteria leave" in shown.stdout
    assert "redundancy" not in as_json("inspect", tiny_checkpoint)
    assert "method must be one of" in refused(2, "inspect", tiny_checkpoint, "--redundancy", "--criteria", "wandaa")
