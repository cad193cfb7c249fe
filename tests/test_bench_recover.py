"""The bench of recovery on tiny models: a recovered model that is the dense one has lost nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from pyprune import prune
from pyprune.model import checkpoint, loading

BENCH = Path(__file__).parent.parent / "bench"


def test_a_whole_run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    bench = importlib.import_module("bench.model.recover")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    model = loading.load_model(str(tiny_checkpoint))
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    checkpoint.save(model, tmp_path / "pruned")
    places = (str(tiny_checkpoint), str(tmp_path / "pruned"), str(tiny_checkpoint))
    size = {"data": None, "tokens": 1024, "items": 0, "new_tokens": 8}
    bench.main(*places, **size, dtype="float32", device="cpu", name="recover")
    result = json.loads((tmp_path / "recover.json").read_text())
    dense, pruned, recovered = (result["models"][name] for name in ("dense", "pruned", "recovered"))
    assert recovered["domains"] == dense["domains"] != pruned["domains"]
    assert recovered["against"]["ratio"]["value"] == 1 != pruned["against"]["ratio"]["value"]
    assert recovered["generation"]["texts"] == dense["generation"]["texts"] != pruned["generation"]["texts"]
    assert result["model"] == "tiny-llama" and str(tmp_path) not in json.dumps(result)
    table = "\n".join(importlib.import_module("bench.tables.readme").TABLES["recover"](result))
    assert table.count(" | 1.000 | ") == 3 and table.count("Prompt ") == 5 and table.count("- *recovered*: ") == 5


def test_the_share_closed_by_hand() -> None:
    quality = importlib.import_module("bench.tables.quality")
    assert quality._closed(1.44, 1.2) == "50%", "halfway in logarithms"
    assert quality._closed(1.2, 1.2) == "0%" and quality._closed(0.9, 0.8) == "-"
