"""The bench of nested widths on a tiny model: it resumes, and its result gives the table and the figure."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def test_measures_resumes_and_draws(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when the script is run
    bench, tables = importlib.import_module("bench.model.nested"), importlib.import_module("bench.tables.nested")
    monkeypatch.setattr(bench, "SHARES", (1.0, 0.5))
    options = {
        "text": None,
        "calibrate": None,
        "model": str(tiny_checkpoint),
        "folder": tmp_path / "checkpoint",
        "method": "magnitude-l2-both",
        "dtype": "float32",
        "tokens": 128,
        "evaluation_tokens": 64,
        "window": 32,
        "prefill_tokens": 8,
        "repeats": 1,
        "name": "tiny",
        "results": tmp_path,
    }
    bench.main(**options)
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["widths"] for row in result["rows"]] == [[96] * 3, [48] * 3]
    full, half = result["rows"]
    assert full["perplexity"] == pytest.approx(result["dense"]["perplexity"], rel=1e-4)
    assert full["perplexity_compensated"] is None
    assert len({half["perplexity"], half["perplexity_compensated"], full["perplexity"]}) == 3
    assert all(row[kind]["p50"] > 0 for row in result["rows"] for kind in ("decode_ms", "prefill_ms", "switch_ms")[:2])
    assert (tmp_path / "tiny.svg").read_text().startswith("<?xml")
    lines = tables.nested_table(result)
    assert len(lines) == 5 and lines[3].startswith("| 100% |") and lines[4].startswith("| 50% |")
    assert len({line.count("|") for line in lines}) == 1
    assert "one checkpoint (magnitude-l2-both)" in tables.nested_caption(result)
    # What was measured is not measured again; what is missing is.
    del result["done"]["perplexity 0.5"]
    result["done"]["perplexity 1.0"] = 7.0
    (tmp_path / "tiny.json").write_text(json.dumps(result))
    bench.main(**options)
    again = json.loads((tmp_path / "tiny.json").read_text())
    assert again["rows"][0]["perplexity"] == 7.0
    assert again["rows"][1]["perplexity"] == pytest.approx(half["perplexity"])
    assert again["rows"][1]["decode_ms"] == half["decode_ms"]
    # Other settings start anew.
    bench.main(**{**options, "repeats": 2})
    assert json.loads((tmp_path / "tiny.json").read_text())["rows"][0]["perplexity"] != 7.0
