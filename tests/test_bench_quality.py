"""The benches of quality by task and of allocations: rows on a tiny model, gone on with, and the tables by hand."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
FACTS = {"gpu": None, "cpu": "a CPU", "torch_threads": 1, "versions": {"torch": "2"}, "date": "2026", "commit": None}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_tasks_are_asked_once_and_of_the_same_items(
    module: Callable[[str], Any],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench, out = module("bench.experiments.quality_tasks"), tmp_path / "q.json"
    asked = iter([{"sentiment": [1.0, 1.0]}, {"sentiment": [1.0, 0.0]}, {"sentiment": [0.0, 0.0]}])
    monkeypatch.setattr(bench, "scores", lambda *given: next(asked))

    def main(checkpoint: list[str], random: list[float], model: str = str(tiny_checkpoint)) -> None:
        bench.main(model=model, checkpoint=checkpoint, random=random, out_file=out)

    main([f"30 %={tiny_checkpoint}"], [])
    main([f"30 %={tiny_checkpoint}"], [0.5])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["dense", "30 %", "50% removed at random"]
    assert rows["30 %"]["scores"] == {"sentiment": [1.0, 0.0]} and rows["dense"]["parameters"] > 0
    assert rows["50% removed at random"]["parameters"] < rows["dense"]["parameters"]
    for given, message in (
        ({"checkpoint": ["nowhere"], "random": []}, "checkpoint must be LABEL=DIR of an existing folder"),
        ({"checkpoint": [], "random": [], "model": "another"}, "out must hold rows of another"),
    ):
        with pytest.raises(typer.Exit):
            main(**given)
        assert message in said(capsys)


def test_quality_by_task_by_hand(module: Callable[[str], Any]) -> None:
    tables = module("bench.tables.quality_tasks")
    right = {task: [1.0] * 80 + [0.0] * 20 for task in tables.TASKS}
    worse = {**right, "sentiment": [1.0] * 50 + [0.0] * 50}
    own = {"rows": {"dense": {"scores": right}, "30 % removed": {"scores": worse}, "other": {"scores": right}}}
    found = tables.compared(own)["30 % removed"]
    assert found["sentiment"].difference.value == pytest.approx(0.3)
    assert found["sentiment"].retained.value == 0 and found["translation"].retained.value == 1
    asked = {
        "piqa": {"items": 500, "accuracy_byte": {"value": 0.6, "interval": [0.5, 0.7]}},
        "generation": {"repetition": {"value": 0.2, "interval": [0.1, 0.3]}},
    }
    suite = {"dense_tasks": asked, "rows": [{"label": "pyprune", "keep": 0.7, **asked}]}
    facts = {"model": "demo", "machine": {**FACTS, "dirty": False}}
    lines = tables.quality_tasks_table({"quality-tasks": {**own, **facts}, "compare-suite": suite})
    assert lines[-3].startswith("| dense | 80% (72% to 88%) |") and "*" not in lines[-3]
    assert lines[-2].startswith("| 30 % removed | 50% (40% to 60%)* | 80% (72% to 88%) |")
    assert lines[-2].endswith("| 60% (50% to 70%) | 20% (10% to 30%) |") and lines[-1].endswith("| - | - |")


def test_allocations_on_a_tiny_model(
    module: Callable[[str], Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, out = module("bench.experiments.allocations"), tmp_path / "p.json"
    monkeypatch.setattr(bench, "KEEPS", (0.5,))
    monkeypatch.setattr(bench, "DEFAULT", {"builtin": 1.0})
    monkeypatch.setattr(bench, "WINDOW", 32)
    monkeypatch.setattr(bench, "TOKENS", 256)
    small = {"uniform": "uniform:multiple=8", "predictor": "predictor:multiple=8,samples=8"}
    monkeypatch.setattr(bench, "ALLOCATIONS", small)
    read = bench.read_material  # of what CPython carries, for there is no data folder
    monkeypatch.setattr(bench, "read_material", lambda data, items: read(None))
    monkeypatch.setattr(bench, "predictor_table", lambda result: [])
    given = {"data": tmp_path, "model": str(tiny_checkpoint), "tokens": 256, "evaluation_tokens": 128}
    bench.main(**given, only="uniform", seconds=math.inf, out_file=out, show_only=False)
    assert list(json.loads(out.read_text())["rows"]) == ["dense", "uniform at 0.5"]
    bench.main(**given, seconds=math.inf, out_file=out, show_only=False)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["dense", "uniform at 0.5", "predictor at 0.5"]
    assert sum(rows["predictor at 0.5"]["widths"]) <= sum(rows["uniform at 0.5"]["widths"])
    assert all(math.isfinite(x) for row in rows.values() for x in row["losses"]["python-docs"])
    monkeypatch.setattr(bench, "prune", None)  # a row measured twice would fail
    bench.main(**given, seconds=math.inf, out_file=out, show_only=False)
    assert json.loads(out.read_text())["rows"] == rows


def test_allocations_by_hand(module: Callable[[str], Any]) -> None:
    tables = module("bench.tables.predictor")
    dense = {"a": [1.0, 2.0], "b": [3.0, 3.0]}
    pruned = {"a": [1.2, 2.2], "b": [3.1, 3.1]}
    assert tables.ratio(pruned, dense) == pytest.approx((math.exp(0.15),) * 3), "every window lost the same"
    rows = {"dense": {"losses": dense}}
    for label, losses, seconds in (("uniform", pruned, 100.0), ("predictor", dense, 140.0)):
        rows[label] = {"label": label, "keep": 0.7, "losses": losses, "cpu_seconds": seconds}
    facts = {"model": "demo", "method": "obs", "repair": "none", "calibration": [{"tokens": 512}], "domains": {"a": 64}}
    lines = tables.predictor_table({**facts, "rows": rows, "machine": {**FACTS, "dirty": False}})
    best = "| 30% | predictor | 1.000 (1.000 to 1.000) | 1.000 | 0.861 (0.861 to 0.861) | 40 s | 140 s |"
    assert lines[-2] == best and lines[-1].startswith(
        "| 30% | uniform | 1.162 (1.162 to 1.162) | 1.221 |  |  | 100 s |"
    )
