"""The findings: verdicts by hand, and whole runs on tiny models that go on where they were stopped."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from pyprune.base.errors import InputError
from pyprune.evaluation.diagnose import Budget
from pyprune.model import checkpoint

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("bench.experiments.findings_claims")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: ModuleType) -> ModuleType:
    module = importlib.import_module("bench.experiments.findings")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "docs" / "findings.md")
    monkeypatch.setattr(module, "WAYS", module.WAYS[:2])
    monkeypatch.setattr(module, "KEEPS", (0.5,))
    monkeypatch.setattr(module, "Budget", lambda prompts, items: Budget(prompts, 8, 6, 1.0, 6))
    return module


def value(mean: float, spread: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "value": mean, "interval": [mean - spread, mean + spread]}


def row() -> dict[str, Any]:
    deviations = {"full": {"total_variation": value(0.3)}, "restricted": {"total_variation": value(0.1)}}
    metric = {"dense": value(0.8), "chance": 0.25, "difference": value(0.0), "retained": value(0.9)}
    drift = {
        k: {"probabilities": value(v)}
        for k, v in (("instantaneous", 0.1), ("accumulated", 0.2), ("exposure", 0.0), ("growth", 0.0))
    }
    whole = {**drift, "median_divergence": 3, "repetition_difference": value(0.1)}
    cosines = {"embedding": 0.1, "logits": 0.01, "centred": 0.1, "probabilities": 0.4}
    return {
        "label": "wanda",
        "keep": 0.7,
        "kept": 0.7,
        "hierarchy": {
            **{name: {"cosine": value(v)} for name, v in cosines.items()},
            "amplification": {"exact": 4.0, "estimate": 3.5},
            "perplexity": {"dense": 20.0, "pruned": 30.0},
        },
        "drift": {"greedy": whole, "sampled": whole},
        "tasks": {
            "tasks": [
                {"name": "choice", "kind": "choice", "metric": metric, "deviations": None},
                {"name": "choice, letters", "kind": "categorical", "metric": metric, "deviations": deviations},
            ],
            "orders": [{"tasks": ["choice", "generation"], "difference": value(0.2)}],
        },
    }


def test_verdicts_by_hand(text: ModuleType) -> None:
    assert text.verdict([0.1, 0.2]) == "holds" and text.verdict([-0.2, -0.1]) == "fails"
    assert text.verdict([-0.1, 0.1]) == "open" and text.verdict(None) == "open" and text.verdict([1, 2], 1.5) == "open"


def test_every_claim_can_hold_and_can_fail(text: ModuleType) -> None:
    good = row()
    assert [claim.judge(good)[0] for claim in text.CLAIMS] == ["holds"] * 4
    bad = copy.deepcopy(good)
    bad["hierarchy"]["probabilities"]["cosine"] = value(0.12)
    bad["drift"]["greedy"]["accumulated"]["probabilities"] = value(-0.2)
    bad["tasks"]["tasks"][1]["deviations"]["restricted"]["total_variation"] = value(0.5)
    bad["tasks"]["orders"][0]["difference"] = value(-0.2)
    assert [claim.judge(bad)[0] for claim in text.CLAIMS] == ["fails"] * 4
    unsure = copy.deepcopy(good)
    unsure["hierarchy"]["probabilities"]["cosine"] = value(0.2, 0.1)
    unsure["drift"]["greedy"]["accumulated"]["probabilities"] = value(0.0)
    unsure["tasks"]["tasks"][1]["deviations"]["restricted"]["total_variation"] = value(0.3)
    unsure["tasks"]["orders"] = []
    guessing = copy.deepcopy(good)
    guessing["tasks"]["tasks"][1]["metric"]["dense"] = value(0.25)
    assert text.CLAIMS[2].judge(guessing)[0] == "open", "a task that the dense model guesses at judges nothing"
    assert [claim.judge(unsure)[0] for claim in text.CLAIMS] == ["open"] * 4


def test_what_most_rows_say(text: ModuleType) -> None:
    assert text.majority(["holds", "holds", "open"]) == "holds" and text.majority(["fails"] * 2) == "fails"
    assert text.majority(["holds", "fails"]) == "open" and text.majority(["holds", "open"]) == "open"


SMALL: dict[str, Any] = {"text": None, "tokens": 512, "window": 64, "diagnosed": 512, "prompts": 3, "dtype": "float32"}
SMALL |= {"keep": None, "way": None, "checkpoint": None, "minutes": 9, "name": "findings", "show": False}


def test_a_whole_run(bench: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**SMALL, "model": str(tiny_checkpoint)}
    bench.main(**{**small, "minutes": -1})
    assert not (tmp_path / "findings.json").exists()
    ways = bench.WAYS
    monkeypatch.setattr(bench, "WAYS", ways[:1])
    bench.main(**small)
    first = json.loads((tmp_path / "findings.json").read_text())
    assert list(first["rows"]) == ["wanda at 0.5"]
    monkeypatch.setattr(bench, "WAYS", ways)
    bench.main(**small)
    facts = json.loads((tmp_path / "findings.json").read_text())
    assert list(facts["rows"]) == ["wanda at 0.5", "wanda + least squares at 0.5"]
    assert facts["rows"]["wanda at 0.5"] == first["rows"]["wanda at 0.5"]
    assert str(tmp_path) not in json.dumps(facts) and facts["settings"]["model"] == "tiny-llama"
    monkeypatch.setattr(sys, "argv", ["x", "--text", "/a/b.txt", "--minutes", "9", "--checkpoint", "mine=/c/d e/"])
    assert bench.command("findings").endswith("bench.experiments.findings --text b.txt --checkpoint 'mine=d e'")

    # A second model, and a checkpoint that was pruned before: blocks of one document.
    bench.main(**{**small, "name": "findings-gemma", "dtype": "bfloat16", "keep": [0.75], "way": ["wanda"]})
    second = json.loads((tmp_path / "findings-gemma.json").read_text())
    assert list(second["rows"]) == ["wanda at 0.75"] and second["settings"]["dtype"] == "bfloat16"
    model, tokenizer = (load(str(tiny_checkpoint)) for load in (bench.load_model, bench.load_tokenizer))
    report = bench.prune(model, 0.5, "magnitude-l2-both", repair=None, provenance={"text": "x", "tokens": 0})
    checkpoint.save(model, tmp_path / "pruned", tokenizer)
    bench.main(**{**small, "name": "findings-recovered", "checkpoint": [f"mine={tmp_path / 'pruned'}"]})
    third = json.loads((tmp_path / "findings-recovered.json").read_text())
    assert list(third["rows"]) == ["mine at 0.5"] and third["rows"]["mine at 0.5"]["kept"] == report.mask.keep
    written = (tmp_path / "docs" / "findings.md").read_text()
    assert written.count("| wanda + least squares | 50% |") == 4 and written.count("### (d) Generation suffers") == 3
    assert "on SmolLM2-135M (" in written and "; " in written and "on SmolLM2-135M after recovery (" in written
    (tmp_path / "docs" / "findings.md").unlink()
    bench.main(**{**small, "show": True})
    assert (tmp_path / "docs" / "findings.md").read_text() == written

    # Rows of other settings, or of another machine, do not join a table.
    kept = (tmp_path / "findings.json").read_text()
    monkeypatch.setattr(bench.machine, "facts", lambda: {"cpu": "another", "commit": None})
    for other in (small, {**small, "tokens": 256}):
        with pytest.raises(typer.Exit):
            bench.main(**other)
    assert (tmp_path / "findings.json").read_text() == kept


def test_rows_that_are_refused(bench: ModuleType, tiny_checkpoint: Path) -> None:
    for bad, said in (
        (lambda: bench.ways(["wands"], [0.5]), "way must be one of .*nearest: wanda"),
        (lambda: bench.ways([], [1.0]), "keep must lie between 0 and 1; got 1"),
        (lambda: bench.given(["folder"]), "checkpoint must be LABEL=FOLDER; got 'folder'"),
        (lambda: bench.given([f"dense={tiny_checkpoint}"]), "checkpoint must hold a model that pyprune pruned"),
    ):
        with pytest.raises(InputError, match=said):
            bad()
    with pytest.raises(typer.Exit):
        bench.main(**{**SMALL, "model": str(tiny_checkpoint), "name": "other"})


def test_the_document_is_that_of_the_committed_results(text: ModuleType) -> None:
    findings = importlib.import_module("bench.experiments.findings")
    assert (BENCH.parent / "docs" / "findings.md").read_text(encoding="utf-8") == findings.text_of(BENCH / "results")
