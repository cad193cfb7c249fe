"""Pruning for generation: differences at equal perplexity by hand, and a whole small run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from test_domains import fill

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("bench.tables.generation")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path, table: ModuleType) -> ModuleType:
    findings = importlib.import_module("bench.experiments.findings")
    module = importlib.import_module("bench.experiments.generation_aware")
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    monkeypatch.setattr(findings, "DOCUMENT", tmp_path / "docs" / "findings.md")
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "cache"))
    small = {"RESULTS": tmp_path, "DEMO": str(tiny_checkpoint), "WINDOW": 32, "TOKENS": 256, "DOMAIN_TOKENS": 64}
    small |= {"JUDGED": 512, "NEW_TOKENS": 4, "PROMPT": 8, "CONTINUED": 24}
    short = {name: module.ARMS[name] for name in ("prose", "continued", "half own", "target")}
    read = module.read_records
    small |= {"ARMS": short, "SAMPLES": 1, "read_records": lambda path: read(path)[:20]}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def row(arm: str, loss: float, exact: float, repeated: float = 0.5) -> dict[str, Any]:
    """Of 100 questions and 100 prompts."""
    right = [float(i < round(100 * exact)) for i in range(100)]
    return {
        "arm": arm,
        "sample": 0,
        "answers": {"exact": right, "contains": right},
        "repeated": {"chat": [repeated] * 50, "prose": [repeated] * 50},
        "losses": {"wikipedia": [loss, loss], "wine": [loss + 1]},
        "kl": [0.2],
        "hidden": [0.1],
        "chosen_by": {"kl": [loss], "hidden": [-loss]},
    }


def result() -> dict[str, Any]:
    line = {"prose, 20 %": (1.0, 0.8), "prose": (2.0, 0.6), "prose, 40 %": (3.0, 0.2)}
    rows = {"dense 0": row("dense", 0.0, 0.9), **{f"{name} 0": row(name, *at) for name, at in line.items()}}
    rows["own 0"], rows["target 0"] = row("own", 1.5, 0.66), row("target", 1.2, 0.95, 0.4)
    rows["ridge 0"], rows["ridge, target 0"] = row("ridge", 1.4, 0.7), row("ridge, target", 2.0, 0.4, 0.6)
    rows["own 1"] = {**rows["own 0"], "sample": 1}  # whose grid is not whole
    where = {
        "gpu": None,
        "cpu": "a CPU",
        "torch_threads": 1,
        "commit": None,
        "versions": {"torch": "2"},
        "date": "2026",
    }
    settings = {"model": "tiny", "tokens": 10, "window": 5, "domain_tokens": 5, "new_tokens": 4}
    return {"settings": settings, "command": "python -m x", "machine": where, "rows": rows}


def test_points_of_a_line_by_hand(table: ModuleType) -> None:
    line = [1.0, 2.0, 4.0]
    assert table.weights(1.5, line) == [0.5, 0.5, 0.0] and table.weights(3.5, line) == [0.0, 0.25, 0.75]
    assert table.weights(2.0, line) == [0.0, 1.0, 0.0] and table.weights(5.0, line) == [0.0, -0.5, 1.5]
    assert table.weights(0.5, line) == [1.5, -0.5, 0.0]


def test_arms_are_judged_at_their_own_perplexity(table: ModuleType) -> None:
    found = table.arms(result()["rows"])
    line = table.line_of(found, table.Arm("dense", [result()["rows"]["dense 0"]]))
    shares = ["prose, 20 %", "prose, 40 %"]
    assert list(found) == ["prose", "own", "target", "ridge", "ridge, target", *shares] and len(line) == 4
    assert found["own"].losses[0] == pytest.approx(2.0) and len(found["own"].rows) == 2  # of domains at 1.5 and 2.5
    # The line was measured in one sample only.
    assert table.differences(found["own"], line, "exact") == pytest.approx([0.66 - (0.8 + 0.6) / 2])
    assert table.differences(found["own"], [found["prose"]], "exact") == pytest.approx([0.06])
    answers, body = table.strategy(result())
    assert "the model's own text, wanda: answers worse in one sample, which has no interval" in answers[0]
    assert "damping 0.1, target 0.5 (chosen by the hidden state): answers worse in one sample" in answers[1]
    assert "target 0.5 (chosen by the KL): answers better in one sample" in answers[1]
    assert sum(line.startswith("| WikiText, wanda") for line in body) == 3


@pytest.mark.parametrize(
    ("values", "sign", "said"),
    [
        ([], 1, "not measured yet"),
        ([0.1, 0.11, 0.12], 1, "better"),
        ([0.1, 0.11, 0.12], -1, "worse"),
        ([-0.02, -0.17, -0.1], 1, "worse in each of 3 samples, though not by the interval"),
        ([-0.2, 0.1, 0.05], 1, "no difference shown"),
    ],
)
def test_a_verdict_is_over_samples(table: ModuleType, values: list[float], sign: int, said: str) -> None:
    assert table.verdict(values, sign) == said


def test_the_divergence_of_two_models_by_hand(bench: ModuleType, tiny: Callable[..., Any]) -> None:
    dense, pruned = (tiny("llama", seed, vocab_size=64) for seed in (0, 1))
    ids = torch.arange(24).view(2, 12)
    assert bench.divergence(dense, dense, ids) == ([0.0, 0.0], [0.0, 0.0])
    kl, hidden = bench.divergence(dense, pruned, ids)
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (dense, pruned))
    assert kl == pytest.approx((p * (p / q).log()).sum(-1).mean(-1).tolist(), rel=1e-3) and min(hidden) > 0


def test_a_whole_run_that_goes_on(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(fill(tmp_path / "data"))
    bench.main(data=data, minutes=-1)
    assert not (tmp_path / bench.STRATEGY).exists()
    path = tmp_path / bench.STRATEGY
    for bad in ({"arms": ["nothing"]}, {"samples": 2}):
        with pytest.raises(typer.Exit):
            bench.main(data=data, **bad)
    bench.main(data=data, arms=["prose"])
    assert list(json.loads(path.read_text())["rows"]) == ["dense 0", "prose 0"]
    bench.main(data=data, minutes=99)
    first = json.loads(path.read_text())
    assert list(first["rows"]) == ["dense 0", "prose 0", "continued 0", "half own 0", "target 0"]
    assert first["rows"]["target 0"]["kept"] == pytest.approx(2 / 3) and first["rows"]["prose 0"]["tokens"] == 256
    assert str(tmp_path) not in json.dumps(first)
    assert "## A strategy for generation" in (tmp_path / "docs" / "findings.md").read_text()
    bench.main(data=data, minutes=99)
    assert json.loads(path.read_text()) == first
    monkeypatch.setattr(bench, "NEW_TOKENS", 5)
    with pytest.raises(typer.Exit):
        bench.main(data=data, minutes=99)
    assert json.loads(path.read_text()) == first, "another setting would have mixed rows"
