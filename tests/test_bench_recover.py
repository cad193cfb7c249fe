"""The bench of recovery on tiny models: a recovered model that is the dense one has lost nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from pyprune import InputError, prune
from pyprune.base.text import default_text
from pyprune.model import checkpoint, loading

BENCH = Path(__file__).parent.parent / "bench"
CPU = {"dtype": "float32", "device": "cpu", "name": "recover"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    module = importlib.import_module("bench.model.recover")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_whole_run(bench: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loading.load_model(str(tiny_checkpoint))
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    pruned, text = tmp_path / "pruned", tmp_path / "text.txt"
    checkpoint.save(model, pruned)
    text.write_text("\n\n".join(part.replace("\n", " ") for part in default_text()[:60_000].split("\n\n")))
    sizes = {"tokens": 128, "window": 64, "items": 8, "context": 8, "continuation": 4, "prompts": 3, "new_tokens": 6}
    places = {"dense": str(tiny_checkpoint), "pruned": str(pruned), "recovered": str(tiny_checkpoint)}
    places["control"] = str(pruned)
    bench.main(
        **places, text=f"{text}:second", also=["default"], **sizes, dtype="float32", device="cpu", name="recover"
    )
    result = json.loads((tmp_path / "recover.json").read_text())
    first, second = result["texts"]
    assert (first, second) == ("text.txt (second half)", "pydoc_data.topics (second half)")
    goal = result["goal"]
    assert goal["met"] and goal["ratio"] == 1 and goal["limit"] == 1.15 and goal["text"] == first
    models = result["models"]
    assert models["recovered"]["perplexity"] == models["dense"]["perplexity"] != models["pruned"]["perplexity"]
    assert models["control"]["perplexity"] == models["pruned"]["perplexity"]
    assert goal["control"] == models["recovered"]["perplexity"][first] / models["control"]["perplexity"][first]
    assert models["recovered"]["choice_lost"][second] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert models["recovered"]["generation"]["divergence"] == 6 > models["pruned"]["generation"]["divergence"]
    assert models["recovered"]["wrote"] == models["dense"]["wrote"] != models["pruned"]["wrote"]
    assert result["dense"] == "tiny-llama" and str(tmp_path) not in json.dumps(result)
    table = "\n".join(importlib.import_module("bench.tables.readme").TABLES["recover"](result))
    assert "+0.0% of dense" in table and "at most +15%: met" in table and "6.0 of 6" in table
    assert "of the dense model trained alike" in table and table.count("| control |") == 3


def test_the_goal_by_hand(bench: ModuleType) -> None:
    pruned = {"a": 26.45, "b": 0.5}
    close = bench.judge({"dense": {"a": 20.0, "b": 1.0}, "pruned": pruned, "recovered": {"a": 23.0, "b": 9.0}})
    assert close["met"] and close["closed"] == {"a": pytest.approx(0.5)}, "23 is halfway in logarithms; b lost nothing"
    far = bench.judge({"dense": {"a": 20.0}, "pruned": pruned, "recovered": {"a": 23.1}})
    assert not far["met"] and far["ratio"] == pytest.approx(1.155) and "control" not in far


def test_prompts_are_starts_of_paragraphs(bench: ModuleType) -> None:
    text = "\n".join(f"p{i} " + "word " * 9 for i in range(10)) + "\nshort one"
    assert bench.prompts_of(text, 5, words=3) == [f"p{i} word word" for i in (0, 2, 4, 6, 8)]
    with pytest.raises(InputError, match="text must have 11 paragraphs of 6 words; got 10"):
        bench.prompts_of(text, 11, words=3)
