"""The script of the trained mixture: what it tries, one structure measured beside the rest, and its table."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from moe_cases import make_mixture

from pyprune import InputError


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("bench.experiments.mixture")


def test_all_ways_are_tried_with_and_without_repair(bench: ModuleType) -> None:
    every = bench.ways()
    assert Counter(way["structure"] for way in every) == {"neurons": 2 * 2 * 10, "experts": 2 * 2 * 5}
    assert Counter(way["repair"] is None for way in every if way["structure"] == "experts") == {True: 10, False: 10}
    assert bench.ways("experts") == [way for way in every if way["structure"] == "experts"]


def test_one_structure_is_measured_beside_the_rest(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_mixture("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.setattr(bench, "ways", lambda structure: [w for w in tried if structure in (None, w["structure"])])
    common = {"keep": 0.5, "repair": "least-squares", "method": "random"}
    tried: list[dict[str, Any]] = [
        {**common, "structure": "neurons", "seed": 0},
        *({**common, "structure": "experts", "seed": seed} for seed in (0, 1)),
        {**common, "structure": "experts", "method": "reap", "seed": 0},
    ]
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    sizes = {"text": "x.txt", "calibration": 256, "judged": 256, "window": 32}
    whole = {**sizes, "machine": {"commit": "a"}, "training_minutes": 1.0, **bench.measured(tmp_path, ids, ids, None)}
    assert [row["structure"] for row in whole["rows"]] == ["neurons", "experts", "experts", "experts"]
    low, high = whole["rows"][3]["interval"]
    assert low <= whole["rows"][3]["over_random"] <= high and "losses" not in whole["rows"][0]
    again = bench.measured(tmp_path, ids, ids, "experts")
    facts = {**sizes, "machine": {"commit": "b"}, "training_minutes": 1.0}
    old, found = bench.beside(whole, facts, again, "experts")
    assert old["machine"] == {"commit": "a"} and old["later"] == {"experts": {"commit": "b"}}
    assert found["rows"] == whole["rows"]  # nothing has changed since
    with pytest.raises(InputError, match=r"out must hold a result of the same text and windows; got \['judged'\]"):
        bench.beside(whole, {**facts, "judged": 1}, again, "experts")
    with pytest.raises(InputError, match="model must have perplexity"):
        bench.beside(whole, facts, {**again, "dense": 2 * again["dense"]}, "experts")
