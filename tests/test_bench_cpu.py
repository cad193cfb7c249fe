"""The CPU bench: its result, its goals and tables on made-up rows, its figure. No test depends on how fast it runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyprune import InputError
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn import dispatch
from pyprune.speed import roofline

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when the script is run
    return importlib.import_module("bench.cpu.run")


@pytest.fixture
def cases(bench: ModuleType) -> ModuleType:
    return importlib.import_module("bench.cpu.cases")


@pytest.fixture
def ways(bench: ModuleType) -> ModuleType:
    return importlib.import_module("bench.cpu.variants")


def _row(bench: ModuleType, weights: str = "bfloat16", tokens: int = 1, keep: float = 0.5, **changes: Any) -> Any:
    """A row of a made-up case; `changes` are times in us by variant (underscores for dashes)."""
    us = {"dense": 400.0, "torch-compact": 200.0, "compact": 100.0, "gather": 104.0}
    us |= {name.replace("_", "-"): value for name, value in changes.items() if name != "hidden_size"}
    variants = {
        name: {
            "us": value,
            "gb_s": 3000 / value,
            "share_of_bandwidth": 95 / value,
            "vs_dense": us["dense"] / value,
            "vs_torch_compact": us["torch-compact"] / value,
        }
        for name, value in us.items()
    }
    return {
        "model": "toy",
        "hidden_size": changes.get("hidden_size", 576),
        "intermediate_size": 1536,
        "gated": True,
        "dtype": "bfloat16" if weights in ("int8", "int4") else weights,
        "weights": weights,
        "tokens": tokens,
        "keep": keep,
        "read": {"gb_s": 31.0},
        "ceiling_us": 95.0,
        "variants": variants,
    }


def _model_row(share_of_ceiling: float) -> dict[str, Any]:
    rates = {"ffn_share": 0.5, "dense_tokens_per_s": 10.0, "tokens_per_s": 13.0, "ratio": 1.3, "ceiling": 4 / 3}
    return {"model": "toy", "weights": "bfloat16", "keep": 0.5, **rates, "share_of_ceiling": share_of_ceiling}


def _goals(bench: ModuleType, rows: list[Any], models: list[Any] | None = None) -> dict[tuple[str, str], Any]:
    return {(g["name"], g["rule"]): g for g in bench.judge({"rows": rows, "models": models or []})}


def _only(goals: dict[tuple[str, str], Any], name: str, rule: str = "") -> Any:
    (found,) = (g for (n, r), g in goals.items() if n.startswith(name) and r.startswith(rule))
    return found


def test_quick_result(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 22)
    file = tmp_path / "cpu.json"
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "not this one")
    bench.main(quick=True, seconds=0.01)
    assert not list(tmp_path.iterdir())
    bench.main(quick=True, seconds=0.01, out_file=file)
    result = json.loads(file.read_text())
    assert result["suite"] == "cpu" and result["machine"]["cores"] >= 1 and "path" not in result["native"]
    assert result["bandwidth_gb_s"] == result["bandwidth"]["gb_s"] > 0 and result["bandwidth_end"]["gb_s"] > 0
    assert set(result["settings"]["huge_pages"]) == {"kernel", "THP_MEM_ALLOC_ENABLE"}
    assert result["models"] == [] and len(result["goals"]) == len(importlib.import_module("bench.cpu.goals").GOALS)
    assert [(r["weights"], r["dtype"]) for r in result["rows"]] == [("bfloat16",) * 2, ("int8", "bfloat16")]
    for row in result["rows"]:
        assert (row["hidden_size"], row["intermediate_size"], row["tokens"], row["keep"]) == (576, 1536, 1, 0.5)
        read, variants = row["read"], row["variants"]
        assert 0 < read["gb_s"] <= read["best_gb_s"] and read["loop"] in roofline.read_loops(torch.ones(1, 1))
        assert set(variants) == {"dense", "torch-compact", "compact", "gather"}
        for entry in variants.values():
            assert entry["us"] == entry["us_quantiles"]["p50"] > 0 and entry["samples"] >= bench.ROUNDS
            assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["us"] / 1e3)
            assert entry["share_of_bandwidth"] == pytest.approx(entry["gb_s"] / read["gb_s"])
            assert entry["vs_dense"] == pytest.approx(variants["dense"]["us"] / entry["us"])
        assert row["ceiling_us"] == pytest.approx(variants["compact"]["bytes"] / read["gb_s"] / 1e3)
        assert variants["dense"]["bytes"] == 3 * 576 * 1536 * 2
    assert result["rows"][1]["variants"]["compact"]["bytes"] == 768 * (3 * 576 + 3 * 4)


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_every_variant_reads_normal_weights(cases: ModuleType, ways: ModuleType, name: str, weights: str) -> None:
    dtype = "bfloat16" if weights in ("int8", "int4") else weights
    case = cases.Case(cases.BY_NAME[name], dtype, weights, 2, 0.5)
    arena = ways.Arena(1 << 26)
    for variant in ways.variants(case, arena, None).values():
        assert len(variant.copies) > 1
        x, weight = variant.copies[-1][:2]
        assert variant.run(*variant.copies[-1]).shape == x.shape
        assert weight.is_contiguous() and weight.data_ptr() != variant.copies[0][1].data_ptr()
        if weight.is_floating_point():
            assert weight.isfinite().all() and weight.abs().min() >= torch.finfo(weight.dtype).tiny


def test_torch_computes_the_ffn_of_the_reference(cases: ModuleType, ways: ModuleType) -> None:
    case = cases.Case(cases.BY_NAME["smollm2-135m"], "float32", "float32", 3, 0.5)
    arena = ways.Arena(1 << 25)
    x, gate, up, down, *_ = ways.variants(case, arena, None)["torch-compact"].copies[0]
    want = ways.torch_ffn(case.shape)(x, gate, up, down, None, None, None)
    found = reference.ffn(x, Record(torch.cat([gate, up, down.t()], 1), True, "silu"))
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_an_arena_without_room_is_refused(ways: ModuleType) -> None:
    with pytest.raises(InputError, match="arena must hold"):
        ways.Arena(1 << 10).copies(torch.float32, (100, 100))


def test_backend_is_the_one_that_auto_takes(cases: ModuleType, ways: ModuleType) -> None:
    arena = ways.Arena(1 << 24)
    for tokens in (1, 512):
        case = cases.Case(cases.BY_NAME["smollm2-135m"], "bfloat16", "bfloat16", tokens, 0.5)
        most = dispatch.native_tokens(torch.bfloat16, torch.bfloat16, 576, False)
        want = "cpu" if tokens <= most else "torch"
        assert ways.variants(case, arena, None)["compact"].backend == want


def test_goals_are_judged_by_their_worst_case(bench: ModuleType) -> None:
    rows = [
        _row(bench, keep=1.0, compact=100.0),  # 0.95 of bandwidth, 4x dense
        _row(bench, keep=1.0, compact=190.0),  # 0.5 of bandwidth, 2.1x
        _row(bench, keep=0.75, compact=500.0),  # the plot's, no goal's
        _row(bench, compact=100.0, gather=104.0),
        _row(bench, hidden_size=2048, compact=100.0, gather=104.0),
        _row(bench, tokens=4, compact=100.0),
        _row(bench, tokens=128, compact=201.0),
        _row(bench, tokens=128, compact=210.0),
        _row(bench, "int8", keep=1.0, compact=160.0),
        _row(bench, "int4", keep=1.0, compact=101.0, hidden_size=2048),  # 0.94 of bandwidth, 3.96x
        _row(bench, inductor_dense=300.0, inductor_compact=150.0),
    ]
    goals = _goals(bench, rows, [_model_row(0.93)])
    floats = _only(goals, "M = 1, floats")
    assert floats["met"] is False and floats["worst"]["value"] == pytest.approx(0.5)
    assert [case["met"] for case in floats["cases"]][:2] == [True, False] and len(floats["cases"]) == 5
    assert _only(goals, "M = 1, int8, D >= 2048")["met"] is None
    assert _only(goals, "M = 1, int8, keep 1.0")["met"] is True
    assert _only(goals, "M = 1, int4, D >= 2048")["met"] is True
    assert _only(goals, "M = 1, int4, keep 1.0")["met"] is False
    slower = _only(goals, "every case")
    assert slower["met"] is False and [c["case"] for c in slower["cases"] if not c["met"]] == [
        "toy bfloat16 M 1 keep 0.75",
        "toy bfloat16 M 128 keep 0.5",
    ]
    assert _only(goals, "M = 4")["met"] is True
    gather = _only(goals, "gather of a random half, M = 1, D < 2048")
    assert gather["at_most"] and gather["met"] is True and gather["worst"]["value"] == pytest.approx(1.04)
    assert _only(goals, "gather of a random half, M = 1, D >= 2048")["met"] is False
    assert _only(goals, "SmolLM2")["met"] is False
    reported = _only(goals, "inductor, keep 0.5")
    assert reported["met"] is None and reported["worst"]["value"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("cpu", "forced", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "", "cpu.json"),
        ("Intel(R) Xeon(R) Processor (family 6, model 143)", "", "cpu.json"),
        ("AMD EPYC (family 25, model 17)", "", "cpu-epyc-25.json"),
        ("AMD EPYC 9654 96-Core Processor", "avx2", "cpu-epyc-avx2.json"),
        ("Neoverse-V2", "", "cpu-neoverse-v2.json"),
    ],
)
def test_each_kind_of_cpu_has_a_result_of_its_own(bench: ModuleType, cpu: str, forced: str, name: str) -> None:
    assert bench.result_file(cpu, forced).name == name


def test_table_for_readme_and_figure(bench: ModuleType, tmp_path: Path) -> None:
    figure, tables = importlib.import_module("bench.tables.cpu_figure"), importlib.import_module("bench.tables.readme")
    keeps = (0.25, 0.5, 0.75)
    rows = [_row(bench, "float32", keep=k, compact=400 * k, hidden_size=2048, inductor_dense=390.0) for k in keeps]
    rows.append(_row(bench, "int8", tokens=64))
    facts = importlib.import_module("pyprune.base.machine").facts()
    result = {"suite": "cpu", "machine": facts, "bandwidth_gb_s": 31.5, "rows": rows, "models": [_model_row(0.975)]}
    result["goals"] = bench.judge(result)
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    made = tables.render("<!-- table:cpu -->\nold\n<!-- /table -->\n", tmp_path)
    line = (
        "| toy 2048 x 1536 | float32 | 1 | 50% | 400 | 390 | 200 | - | 200 | 104 | 31.0 | 15.0 | 48% | 2.00x | 1.00x |"
    )
    assert line in made and "old" not in made and "memory read at 31.5 GB/s" in made
    assert "| toy 2048 x 1536 | int8" not in made and "| toy 576 x 1536 | int8 (bfloat16 x) | 64 | 50% |" in made
    assert "| toy | bfloat16 | 50% | 50% | 10.0 | 13.0 | 1.30x | 1.33x | 98% |" in made
    assert "| no: 1 of 2 | 0.475 | toy float32 M 1 keep 0.5 |" in made
    svg = tmp_path / "cpu.svg"
    figure.draw(result, svg, "toy", "float32")
    text = svg.read_text()
    assert text.startswith("<?xml") and "bytes / read bandwidth" in text and len(text) < 60_000
    figure.draw(result, svg, "toy", "float32")
    assert svg.read_text() == text
    with pytest.raises(InputError, match="result must hold toy in int8"):
        figure.draw(result, svg, "toy", "int8")


def test_cases_can_be_chosen(cases: ModuleType) -> None:
    assert cases.choose("", "", "") == cases.all_cases()
    some = cases.choose("gpt2,smollm2-135m", "int8", "1,4")
    assert {(c.shape.name, c.weights) for c in some} == {("gpt2", "int8"), ("smollm2-135m", "int8")}
    assert {c.tokens for c in some} == {1, 4}
    with pytest.raises(InputError, match="weights must be"):
        cases.choose("", "int2", "")
