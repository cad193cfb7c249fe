"""The GPU bench without a GPU: its kernels, its scheduling by made-up workers, its goals and tables."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_bench import WORKER, Load, load, run

__all__ = ["load"]


# --- the cases


def test_every_goal_has_cases(load: Load) -> None:
    cases, goals = load("bench.gpu.cases").all_cases(), load("bench.gpu.goals")
    rows = [{"kind": c.kind, "keep": c.keep, "tokens": c.tokens, "case": c.name} for c in cases]
    for goal in goals.GOALS:
        assert any(goal.where(row) for row in rows), goal.name
    assert len({case.name for case in cases}) == len(cases)
    for name in goals.LARGE:
        points = {(c.tokens, c.keep) for c in cases if c.shape.name == name}
        assert {(1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (64, 0.5), (512, 0.5), (4096, 0.5)} <= points
    assert {c.shape.name for c in cases if c.kind == "small"} == set(goals.SMALL)
    assert {"model", "inductor", "int8"} <= {c.kind for c in cases}
    rivals = {name for case in cases for name in case.wants}
    assert rivals == set(load("bench.gpu.rivals").RIVALS)
    assert {name for name, _ in load("bench.gpu.cases").INDUCTOR} >= set(goals.SMALL)


def test_dry_cases_are_the_same_cases(load: Load) -> None:
    cases = load("bench.gpu.cases")
    assert len(cases.dry_cases()) == len(cases.all_cases())
    assert {c.kind for c in cases.choose("decode,gpt2", cases.all_cases())} == {"decode", "small"}


# --- measuring


def test_kernels_in_the_interpreter(load: Load, tmp_path: Path) -> None:
    """The Triton backend, the gather rival and the read loop, checked against float64 on the way."""
    worker, lines = load("bench.gpu.worker"), tmp_path / "lines.jsonl"
    names = ["llama-3-8b M 1 keep 0.25", "opt-6.7b M 1 keep 0.25"]
    plan = {"cases": names, "skip": {}, "until": time.time() + 300, "dry": True, "ceilings": False}
    assert worker.Worker(lines, plan).run() == 0
    said = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = [line["row"] for line in said if "row" in line]
    for row in rows:
        assert {"compact:triton", "gather:triton", "two-kernel gather"} <= set(row["variants"]), row["failed"]
    assert len(rows) == 2


def test_clocks_are_those_of_the_gpu_that_torch_sees(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its UUID: where CUDA_VISIBLE_DEVICES names some, number 0 is another one to NVIDIA's own tools."""
    import torch

    clocks, asked = load("bench.gpu.clocks"), []

    found = {"nvmlDeviceGetHandleByUUID": lambda name, device: asked.append(name.decode()) or 1}
    nvml = SimpleNamespace(nvmlInit_v2=lambda: 0, **found)

    def smi(command: list[str], **options: Any) -> Any:
        asked.append(command[command.index("-i") + 1])
        raise OSError

    monkeypatch.setattr(clocks.subprocess, "run", smi)
    monkeypatch.setattr(clocks.ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (clocks.clocks(), clocks.Clocks().read(), asked) == ({}, {}, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = SimpleNamespace(uuid="12345678-90ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    assert (clocks.clocks(), clocks.Clocks().read()) == ({}, {})
    assert asked == ["GPU-12345678-90ab"] * 3


def test_the_read_loop_reads_every_word(load: Load) -> None:
    import torch

    buffer = torch.randint(-(2**31), 2**31 - 1, (2 * 2 * 4 * 4096,), dtype=torch.int32)
    sums, read = load("bench.gpu.read").reader(buffer, 2)
    wanted = [0, 0]
    for i, half in enumerate(buffer.view(2, -1).tolist()):
        for word in half:
            wanted[i] ^= word
    assert sums.tolist() == wanted and read == 4 * len(buffer)


_COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from bench.gpu import gather_rival as rival
from bench.gpu import read

def compiled(kernel, signature, constants):
    source = triton.compiler.ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(constants, "constexpr")},
                                       constexprs=constants)
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])

b, i, f = "*bf16", "*i32", "*fp32"
for gated, act in ((True, "silu"), (False, "relu")):
    for m in (1, 4):
        assert compiled(rival._hidden_kernel,
                        dict(x=b, gate=b, up=b, bias=b, index=i, hidden=f, out=f, K="i32", D="i32"),
                        dict(M=m, GATED=gated, BIAS=not gated, ACT=act, BLOCK_K=16, BLOCK_D=256))
assert compiled(rival._down_kernel, dict(hidden=f, down=b, index=i, out=f, K="i32", D="i32"),
                dict(M=4, BLOCK_K=64, BLOCK_D=512))
assert compiled(read._read_kernel, dict(source=i, sums=i, steps="i32"), dict(BLOCK=4096, UNROLLED=4))
print("compiled")
"""


def test_the_benchs_own_kernels_compile_for_hopper() -> None:
    done = run("-c", _COMPILE)
    assert done.stdout.strip() == "compiled", done.stderr


# --- scheduling, by workers that are made up


def _scheduled(load: Load, folder: Path, how: str, seconds: float = 60, words: str = "few") -> dict[str, Any]:
    script, bench, cases = folder / "worker.py", load("bench.gpu.run"), load("bench.gpu.cases")
    script.write_text(WORKER)
    report = bench.Report(folder / "gpu.json", {})
    chosen = cases.choose(words, cases.dry_cases())
    until = time.time() + seconds
    plan = bench.Schedule(
        report,
        chosen,
        True,
        folder / "bench.log",
        lambda *files: [sys.executable, str(script), *map(str, files), how],
    )
    report.result["state"] = plan.run(folder, until)
    on_disk = json.loads((folder / "gpu.json").read_text())
    assert on_disk["rows"] == report.result["rows"]
    return report.result


def test_a_lost_device_costs_one_variant(load: Load, tmp_path: Path) -> None:
    result = _scheduled(load, tmp_path, "lost")
    assert result["state"] == "complete" and len(result["rows"]) == len({r["case"] for r in result["rows"]}) == 14
    assert any("opt-6.7b M 16 keep 0.5: compact:cuda" in name for name in result["broken"])
    assert "illegal address" in json.dumps(result["broken"])


def test_a_hang_costs_one_variant(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("bench.gpu.run"), "PATIENCE", 0.5)
    result = _scheduled(load, tmp_path, "hang")
    assert result["state"] == "complete" and len(result["rows"]) == 14
    assert "silent for" in json.dumps(result["broken"])


def test_a_budget_leaves_the_last_cases_out(load: Load, tmp_path: Path) -> None:
    result = _scheduled(load, tmp_path, "well", seconds=0.5)
    assert result["state"] == "complete" and len(result["left_out"]) == 14 and result["rows"] == []


def test_first_cases_first_then_what_they_had_no_time_for(load: Load, tmp_path: Path) -> None:
    bench, cases = load("bench.gpu.run"), load("bench.gpu.cases")
    (tmp_path / "worker.py").write_text(WORKER)
    report = bench.Report(tmp_path / "gpu.json", {})
    command = lambda *files: [sys.executable, str(tmp_path / "worker.py"), *map(str, files), "well"]  # noqa: E731
    plan = bench.Schedule(report, cases.dry_cases(), True, tmp_path / "bench.log", command)
    first = [c.name for c in cases.dry_cases() if c.kind in cases.FIRST]
    assert plan.run(tmp_path, time.time() + 0.5, cases.FIRST) == "complete"
    assert report.result["left_out"] == first and report.result["rows"] == []
    assert plan.run(tmp_path, time.time() + 60, cases.FIRST) == "complete"
    assert [row["case"] for row in report.result["rows"]] == first and report.result["left_out"] == []
    assert plan.run(tmp_path, time.time() + 60) == "complete"
    assert len(report.result["rows"]) == len(cases.dry_cases())
    assert [c.kind for c in cases.all_cases()][: len(first)] == ["decode"] * 4 + ["small"] * 2 + ["decode"] * 2


def test_a_worker_that_cannot_start_is_not_tried_for_ever(load: Load, tmp_path: Path) -> None:
    bench, cases = load("bench.gpu.run"), load("bench.gpu.cases")
    report = bench.Report(tmp_path / "gpu.json", {})
    plan = bench.Schedule(
        report,
        cases.dry_cases()[:1],
        True,
        tmp_path / "bench.log",
        lambda *_: [sys.executable, "-c", "raise SystemExit('no')"],
    )
    assert "no worker comes to work: ended with 1; no" in plan.run(tmp_path, time.time() + 60)


def test_a_graph_is_as_long_as_it_must_be(load: Load) -> None:
    timing = load("bench.gpu.timing")
    assert timing.repeats(2, 80e-6) == 13 and timing.repeats(2, 1.0) == 1
    assert timing.repeats(114, 3e-6) == 6 and timing.repeats(600, 1e-6) == 1


# --- goals and tables


def _row(kind: str = "decode", keep: float = 0.5, tokens: int = 1, model: str = "llama-3-8b", **us: float) -> Any:
    """A row of a made-up case; `us` by variant (underscores for spaces)."""
    variants = {
        name.replace("_", " "): {"us": value, "gb_s": 4000 * 50 / value, "launches": 1, "backend": "cuda"}
        for name, value in us.items()
    }
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "weights": "int8" if kind == "int8" else "bfloat16"}
    facts = {"case": f"{model} {kind} M {tokens} keep {keep:g}", "model": model, "failed": {}, "unusable": {}}
    return {**facts, **sizes, "kind": kind, "keep": keep, "tokens": tokens, "variants": variants}


def _goal(goals: list[dict[str, Any]], name: str, rule: str = "") -> dict[str, Any]:
    (found,) = (g for g in goals if g["name"].startswith(name) and rule in g["rule"])
    return found


def _result() -> dict[str, Any]:
    rows = [
        _row(keep=1.0, dense=100, dense_fused=95, compact=54),
        _row(dense=100, compact=60, gather=61),  # 0.83 of bandwidth
        _row(keep=0.25, dense=100, compact=56, gather=60),
        _row("few", tokens=16, dense=100, compact=50),
        _row("small", model="gpt2", dense=10, compact=4),
        _row("int8", keep=1.0, compact=100, int8=50),
        _row("prefill", tokens=4096, dense=100, compact_cublas=50, compact=51),
        _row("medium", tokens=512, compact=100, gather=120),
    ]
    rows[1]["variants"]["compact:cuda"] = {"us": 52, "gb_s": 3850.0, "backend": "cuda"}
    models = [{"case": "whole model", "share_of_ceiling": 0.95, "in_graph": True, "ffn_share": 0.7, "ratio": 1.46}]
    models[0] |= {"ceiling": 1.54, "keep": 0.5, "layers": 32}
    models[0]["models"] = {name: {"step_ms": 4.0} for name in ("dense", "narrow", "accelerated")}
    read = {"gb_s": 4000.0, "loop": "sum"}
    ceilings = {"read": read, "gemm": {"tflop_s": 700.0, "n": 8192, "dtype": "bfloat16"}}
    return {
        "rows": rows,
        "models": models,
        "ceilings": ceilings,
        "inductor": {"gpt2 M 1": {"us": 9.0}},
        "state": "made up",
    }


def test_goals_are_judged_by_their_worst_case(load: Load) -> None:
    judged = load("bench.gpu.goals").judge(_result())
    wide = _goal(judged, "decode M = 1, keep 1.0")
    assert wide["met"] is False and wide["worst"]["case"].endswith("gather") and len(wide["cases"]) == 3
    compact = next(c for c in wide["cases"] if c["case"] == "llama-3-8b decode M 1 keep 0.5 compact")
    assert not compact["met"] and compact["best"] == {"variant": "compact:cuda", "value": 3850 / 4000, "met": True}
    assert _goal(judged, "decode M = 1, keep 0.25")["met"] is False
    over = _goal(judged, "decode M = 1", "best dense")
    assert over["worst"]["value"] == pytest.approx(100 / 60 * 0.25)
    assert _goal(judged, "small", "one launch")["met"] is True
    assert _goal(judged, "small", "compile")["worst"]["value"] == pytest.approx(2.25)
    assert _goal(judged, "M = 4")["worst"]["value"] == pytest.approx(1.0)
    assert _goal(judged, "gather, decode")["met"] is False and _goal(judged, "gather, M = 512")["met"] is False
    assert _goal(judged, "prefill", "never slower")["met"] is True and _goal(judged, "prefill", "dense")["met"] is True
    assert _goal(judged, "int8")["met"] is True
    assert _goal(judged, "whole model")["met"] is True


def test_a_time_that_overlaps_is_called_so(load: Load) -> None:
    row = _row(dense=100, compact=60, gather=61) | {"between_us": 2.0}
    row["variants"]["compact:cuda #2"] = {"us": 45.0, "gb_s": 3900.0, "apart_us": 57.5, "programmatic_edges": 1}
    row["variants"]["compact:cuda #2"]["plan"] = {"overlap": 1, "early": 0, "bulk": 1}
    result = _result() | {"rows": [row]}
    best = _goal(load("bench.gpu.goals").judge(result), "decode M = 1, keep 1.0")["cases"][0]["best"]
    assert best["variant"] == "compact:cuda #2, overlapping its own next call"
    (cells,) = load("bench.gpu.tables").overlap_rows(result)
    assert cells[1:] == ["compact:cuda #2", "overlap, bulk", "45.00", "57.50", "2.00", "1"]


def test_goals_of_a_run_that_was_cut_short(load: Load) -> None:
    goals = load("bench.gpu.goals")
    judged = goals.judge({"rows": [], "models": []})
    assert all(goal["met"] is None and goals.cells(goal)[2] == "not measured" for goal in judged)
    row = _row(dense=100, gather=60)
    row["failed"]["compact"] = "wrong result: error 1"
    over = _goal(goals.judge({"rows": [row]}), "decode M = 1", "best dense")
    assert over["met"] is False and goals.cells(over)[3] == "failed"
    model = _result()["models"][0] | {"in_graph": False}
    assert _goal(goals.judge({"models": [model]}), "whole model")["met"] is False


def test_table_for_readme(load: Load, tmp_path: Path) -> None:
    tables = load("bench.tables.readme")
    readme = "<!-- table:gpu -->\nold\n<!-- /table -->\n"
    assert tables.render(readme, tmp_path) == "<!-- table:gpu -->\n<!-- /table -->\n"
    result = _result() | {"machine": load("pyprune.base.machine").facts(), "bandwidth_gb_s": 4000.0}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    made = tables.render(readme, tmp_path)
    assert (
        "| llama-3-8b 4096 x 14336 | bfloat16 | 1 | 50% | 100 | - | - | 60.00 | cuda | 61.00 | cuda | 3,333 | 83% |"
        in made
    )
    assert "not measured" in made and "Memory read at 4,000 GB/s (sum)" in made and "| LLaMA, 32 layers | 50% |" in made
    (tmp_path / "gpu.json").write_text(json.dumps({"state": "no worker comes to work", "rows": []}))
    assert "Nothing was measured" in tables.render(readme, tmp_path)


def test_messages_of_tests_name_no_folder_of_the_machine(load: Load) -> None:
    testing = load("bench.gpu.tests")
    told = f"{testing.ROOT}/tests/test_gpu.py:1: in {sys.prefix}/lib/x.py"
    assert testing._placeless(told) == "tests/test_gpu.py:1: in lib/x.py"
