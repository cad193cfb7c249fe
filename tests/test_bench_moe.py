"""The bench of experts on a tiny mixture: its result, its goals and its table. No test depends on how fast it runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from pyprune import InputError
from pyprune.speed import roofline

BENCH = Path(__file__).parent.parent / "bench"


def test_result_goals_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when the script is run
    bench, tables = importlib.import_module("bench.cpu.moe"), importlib.import_module("bench.tables.moe")
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 22)
    small = {"hidden_size": 64, "intermediate_size": 32, "experts": 8, "picked": 2}
    tiny = {name: dataclasses.replace(shape, **small) for name, shape in bench.SHAPES.items()}
    monkeypatch.setattr(bench, "SHAPES", tiny)
    monkeypatch.setattr(bench, "RESULT", tmp_path / "moe.json")
    with pytest.raises(InputError, match="tokens must be one of 1, 4, 16, 256; got '3'"):
        bench.main(tokens="3")
    bench.main(seconds=0.01)
    result = json.loads((tmp_path / "moe.json").read_text())
    assert result["bandwidth_gb_s"] > 0 and "path" not in result["native"]
    rows = result["rows"]
    assert [(r["model"], r["tokens"], r["keep"]) for r in rows] == [
        (name, tokens, keep) for name in tiny for tokens in bench.TOKENS for keep in bench.KEEPS
    ]
    for row in rows:
        ways, mine = row["transformers"]["ways"], row["pruned_moe"]
        assert set(ways) == {"grouped_mm", "eager"} | ({"batched_mm"} if row["tokens"] <= 4 else set())
        assert row["transformers"]["us"] == min(way["p50"] for way in ways.values()) > 0
        assert (row["transformers_pruned"] is None) == (row["keep"] == 1)
        assert 2 <= row["active"] <= 8 and mine["bytes"] == row["active"] * row["keep"] * 32 * 3 * 64 * 2
        assert row["gb_s"] == pytest.approx(mine["bytes"] / mine["us"] / 1e3)
        assert row["vs_transformers"] == pytest.approx(row["transformers"]["us"] / mine["us"])
    lines = tables.moe_table(result)
    assert len(lines) == 2 + 2 + len(rows) + 1 + 2 and len({line.count("|") for line in lines[2:-3]}) == 1
    fast = [{**row, "vs_transformers": 1.6, "vs_keep_1": 1.79} for row in rows]
    assert [(g["met"], round(g["worst"], 3)) for g in bench.judge(fast)] == [(True, 1.6), (False, 0.895)]
    slow = [{**row, "vs_transformers": 1.4 if row["tokens"] == 16 else 9.0, "vs_keep_1": 1.8} for row in rows]
    assert [(g["met"], g["at"].split(" M ")[1]) for g in bench.judge(slow)] == [
        (False, "16 keep 1"),
        (True, "1 keep 0.5"),
    ]
