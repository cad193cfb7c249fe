"""The GPU bench of experts, rehearsed on a CPU with tiny mixtures. No test depends on how fast it runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def test_a_rehearsal_measures_every_case_and_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when the script is run
    bench, rows_of = (importlib.import_module(f"bench.gpu.{name}") for name in ("experts", "expert_rows"))
    with pytest.raises(SystemExit):
        bench.main(["--dry-run"])
    path = tmp_path / "experts.json"
    monkeypatch.setattr(bench, "SHAPES", dict(list(bench.SHAPES.items())[:1]))
    monkeypatch.setitem(sys.modules, "bench.gpu.read", None)  # its loops take long in the interpreter
    assert bench.main(["--dry-run", "--out", str(path), "--budget", "3600"]) == 0
    result = json.loads(path.read_text())
    assert (result["state"], result["dry_run"], result["left_out"]) == ("complete", True, [])
    rows = result["rows"]
    assert sorted((r["model"], r["tokens"], r["keep"]) for r in rows) == sorted(
        (name, tokens, keep) for name in bench.SHAPES for tokens in (1, 4) for keep in bench.KEEPS
    )
    for row in rows:
        assert row["failed"] == {}
        prefix = "" if row["keep"] == 1 else "pruned "
        ways = {prefix + name for name in ("grouped_mm", "batched_mm", "eager")}
        gather = {"triton gather"} if row["keep"] < 1 else set()
        assert {"triton", "torch", "triton #1", *ways, *gather} <= row["variants"].keys()
        assert row["bytes"] == row["active"] * row["keep"] * 32 * 3 * 32 * 2
        for name, facts in row["variants"].items():
            assert facts["us"] > 0 and facts["error"] <= max(2 * facts["torch_error"], rows_of.CLOSE), name
            assert facts["captured"] or facts["why_not_captured"] == rows_of.WAITS
            assert facts["share_of_read"] == pytest.approx(row["bytes"] / facts["us"] / 1e3 / row["read_gb_s"])
        dense = next(r for r in rows if (r["model"], r["tokens"], r["keep"]) == (row["model"], row["tokens"], 1.0))
        best = min(dense["variants"][name]["us"] for name in ("grouped_mm", "batched_mm", "eager"))
        assert row["vs_dense"] == pytest.approx(best / row["variants"]["triton"]["us"])
        assert ("host_us" in row["variants"]["triton"]) == (row["tokens"] == 1)
    assert len(capsys.readouterr().out.splitlines()) == 3 * len(rows) + 1


def test_a_wrong_result_is_recorded_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    bench = importlib.import_module("bench.gpu.experts")
    run = bench.Bench(tmp_path / "x.json", True, 60.0)
    shape = next(iter(bench.tiny().values()))
    case = run._make(bench.Layers.make(shape, 1.0, run.timer.device), 1, 1.0)
    name, calls, _ = next(bench.our_ways(case))
    bench.prepare(run.timer, case, name, [lambda: 2 * calls[0]()], True)
    assert case.row["variants"] == {} and case.row["failed"]["triton"].startswith("WrongResult: wrong result: error")
    bench.prepare(run.timer, case, name, [lambda: 1 / 0], True)
    assert case.row["failed"]["triton"].startswith("ZeroDivisionError")
