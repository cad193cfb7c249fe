"""The GPU bench without a GPU: a dry run of its own code, its scheduling by made-up workers, its goals and tables."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(BENCH))  # as when a script is run
    return importlib.import_module


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    places = os.pathsep.join([str(BENCH / "checkout"), str(BENCH)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": places, **environment},
        capture_output=True,
        text=True,
    )


# --- the cases


def test_every_goal_has_cases(load: Load) -> None:
    cases, goals = load("gpu_cases").all_cases(), load("goals_gpu")
    rows = [{"kind": c.kind, "keep": c.keep, "tokens": c.tokens, "case": c.name} for c in cases]
    for goal in goals.GOALS:
        assert any(goal.where(row) for row in rows), goal.name
    assert len({case.name for case in cases}) == len(cases)
    for name in goals.LARGE:
        points = {(c.tokens, c.keep) for c in cases if c.shape.name == name}
        assert {(1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (64, 0.5), (512, 0.5), (4096, 0.5)} <= points
    assert {c.shape.name for c in cases if c.kind == "small"} == set(goals.SMALL)
    assert {"model", "inductor", "int8", "contextual"} <= {c.kind for c in cases}
    rivals = {name for case in cases for name in case.wants}
    assert rivals == set(load("gpu_rivals").RIVALS)
    assert {name for name, _ in load("gpu_cases").INDUCTOR} >= set(goals.SMALL)


def test_dry_cases_are_the_same_cases(load: Load) -> None:
    cases = load("gpu_cases")
    assert len(cases.dry_cases()) == len(cases.all_cases())
    assert {c.kind for c in cases.choose("decode,gpt2", cases.all_cases())} == {"decode", "small"}


# --- the rehearsal: the whole command on a CPU


def _command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.Popen(
        [sys.executable, str(BENCH / "gpu.py"), "--dry-run", *arguments],
        env={**kept, "OUT": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _handed(folder: Path) -> dict[str, Any]:
    """The result as it is on disk now; also checks all else that would come back at this moment."""
    files = sorted(folder.iterdir())
    assert len(files) <= 8 and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", f.name) for f in files), files
    assert all(file.is_file() and file.stat().st_size < 16 << 20 for file in files)
    return json.loads((folder / "gpu.json").read_text()) if (folder / "gpu.json").is_file() else {}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, Path]:
    """The results on disk while it ran, the last one as it ended; what was printed; the folder."""
    folder = tmp_path_factory.mktemp("rehearsed")
    process, seen = _command(folder=folder), []
    while process.poll() is None:
        seen.append(_handed(folder))
        time.sleep(0.05)
    said = process.communicate()[0]
    assert process.returncode == 0, said + (BENCH.parent / "build" / "gpu-dry" / "bench.log").read_text()
    return [*seen, _handed(folder)], said, folder


def test_the_rehearsal_goes_through_every_stage(rehearsed: tuple[list[dict[str, Any]], str, Path], load: Load) -> None:
    seen, said, folder = rehearsed
    stages = seen[-1]["stages"]
    assert list(stages) == ["probe", "plans", "warm", "first cases", "tests", "sanitizer", "other cases"]
    began = [facts["began"] for facts in stages.values()]
    assert began == sorted(began) and all(f["seconds"] >= 0 and f"  {name}: " in said for name, f in stages.items())
    assert seen[-1]["seconds"] == pytest.approx(began[-1] + stages["other cases"]["seconds"], abs=5)
    assert stages["tests"]["counts"] == {"passed": 4} and stages["warm"]["codes"] == [0]
    if load("gpu_plans").simulator() is not None:
        names = {c.name for c in load("gpu_cases").all_cases() if c.kind in ("decode", "small", "int8", "contextual")}
        assert names <= set(stages["plans"]["cases"])
        assert all(len(plans) > 3 for plans in stages["plans"]["cases"].values())
    assert {"gpu.json", "tests.log", "outcomes.jsonl"} <= {file.name for file in folder.iterdir()}


def test_the_result_grows_by_case_and_stage(rehearsed: tuple[list[dict[str, Any]], str, Path]) -> None:
    seen, _, _ = rehearsed
    rows = [len(result.get("rows", [])) for result in seen]
    assert rows == sorted(rows) and len(set(rows)) > 10
    during = [result for result in seen if result.get("state") == "running: tests"]
    assert during and all({row["kind"] for row in result["rows"]} == {"decode", "small"} for result in during)


@pytest.mark.parametrize("stage", ["plans", pytest.param("first cases", marks=pytest.mark.slow)])
def test_a_kill_leaves_what_was_done(stage: str, tmp_path: Path) -> None:
    process = _command("--quick", "--cases", "decode", folder=tmp_path)
    while True:
        now = _handed(tmp_path)
        if stage in now.get("stages", {}) and (stage == "plans" or now["rows"]):
            break
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = _handed(tmp_path)
    assert left["state"] == f"running: {stage}" and left["stages"]["probe"]["torch"]
    time.sleep(1)
    assert _handed(tmp_path) == left, "nobody goes on"


def test_a_polite_end_is_recorded(tmp_path: Path) -> None:
    process = _command("--quick", folder=tmp_path)
    while not _handed(tmp_path).get("stages", {}).get("probe"):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143
    assert "ended by SystemExit" in _handed(tmp_path)["state"]


_KILLED = """
import os, sys
from pathlib import Path
import gpu_output
Path.replace = lambda *_: os._exit(9)
gpu_output.place("new", Path(sys.argv[1]) / "gpu.json", Path(sys.argv[2]))
"""


def test_a_kill_between_writing_and_renaming(load: Load, tmp_path: Path) -> None:
    out, work, output = tmp_path / "out", tmp_path / "work", load("gpu_output")
    output.place("old", out / "gpu.json", work)
    assert _run("-c", _KILLED, str(out), str(work)).returncode == 9
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "old"}
    output.place("new", out / "gpu.json", work)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "new"} and not list(work.iterdir())


def test_on_another_file_system_it_is_written_beside(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, output, rename = tmp_path / "out", load("gpu_output"), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.parent != target.parent:
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    output.place("all of it", out / "gpu.json", tmp_path / "work")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "all of it"}
    assert not list((tmp_path / "work").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"out", "work"}
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        output.place("more", out / "gpu.json", tmp_path / "work")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "all of it"}


def test_logs_come_back_without_their_middle(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = load("gpu_output")
    monkeypatch.setattr(output, "HEAD", 5)
    monkeypatch.setattr(output, "TAIL", 8)
    logs, out = tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    handed = output.Handed(logs, out)
    handed.now()
    (logs / "build.log").write_text("begin" + "x" * 1000 + "the last")
    for i in range(3):
        (logs / f"tests-{i}.log").write_text(f"test {i}")
    (logs / "probe.log").write_text("stays")
    handed.now()
    assert (out / "build.log").read_text() == "begin\n[... 1000 bytes left out ...]\nthe last"
    assert [line for line in (out / "tests.log").read_text().split("=== ") if line][1].startswith("tests-1.log\n")
    assert {p.name for p in out.iterdir()} == {"build.log", "tests.log"}
    assert len(output.LOGS) + 1 < output.MOST_FILES, "and one that a kill may leave"


def test_the_rehearsal_measures_every_case(rehearsed: tuple[list[dict[str, Any]], str, Path], load: Load) -> None:
    seen, said, _ = rehearsed
    result = seen[-1]
    assert result["state"] == "complete" and result["dry_run"] and result["left_out"] == [] and result["broken"] == {}
    names = {c.name for c in load("gpu_cases").dry_cases() if c.kind not in ("model", "inductor")}
    assert {row["case"] for row in result["rows"]} == names
    for row in result["rows"]:
        contextual, all_kept = row["kind"] == "contextual", row["keep"] == 1
        wanted = {"gather", "contextual"} if contextual else {"dense", "compact", "compact:torch", "compact:cpu"}
        wanted |= set() if contextual or all_kept else {"compact cublas"}
        wanted |= {"int8"} if row["kind"] == "int8" else set() if all_kept else {"gather"}
        assert wanted <= set(row["variants"])
        assert all("Error" not in why for why in row["failed"].values()), row["failed"]
        ours = ("gather", "int8", "contextual")
        for name, entry in row["variants"].items():
            assert entry["us"] == entry["us_quantiles"]["p50"] > 0 and entry["samples"] == 4
            assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["us"] / 1e3)
            separable = {"compact:cpu", "int8:cpu", "gather:cpu"} if row["tokens"] <= 16 else set()
            assert ("apart_us" in entry) == (name in separable)
            assert ("error" in entry) == (name.split(":")[0] == "compact" or name.split(":")[0].split()[0] in ours)
    assert any(entry["sets"] > 1 for entry in result["rows"][0]["variants"].values())
    assert {len(result["inductor"]), len(load("gpu_cases").INDUCTOR)} == {4}
    assert all(entry["us"] > 0 for entry in result["inductor"].values())
    (model,) = result["models"]
    assert set(model["models"]) == {"dense", "narrow", "accelerated"} and model["share_of_ceiling"] > 0
    assert result["bandwidth_gb_s"] == result["ceilings"]["read"]["gb_s"] > 0
    assert all(goal["cases"] or goal["name"].startswith(("small", "two-kernel", "2:4")) for goal in result["goals"])
    assert "GB/s" in said and "Amdahl" in said


def test_kernels_in_the_interpreter(load: Load, tmp_path: Path) -> None:
    """The Triton backend, the gather rival and the read loop, checked against float64 on the way."""
    worker, lines = load("gpu_worker"), tmp_path / "lines.jsonl"
    names = ["llama-3-8b M 1 keep 0.25", "opt-6.7b M 1 keep 0.25"]
    plan = {"cases": names, "skip": {}, "until": time.time() + 300, "dry": True, "ceilings": False}
    assert worker.Worker(lines, plan).run() == 0
    said = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = [line["row"] for line in said if "row" in line]
    for row in rows:
        assert {"compact:triton", "gather:triton", "two-kernel gather"} <= set(row["variants"]), row["failed"]
    assert len(rows) == 2


def test_the_read_loop_reads_every_word(load: Load) -> None:
    import torch

    buffer = torch.randint(-(2**31), 2**31 - 1, (2 * 2 * 4 * 4096,), dtype=torch.int32)
    sums, read = load("gpu_read").reader(buffer, 2)
    wanted = [0, 0]
    for i, half in enumerate(buffer.view(2, -1).tolist()):
        for word in half:
            wanted[i] ^= word
    assert sums.tolist() == wanted and read == 4 * len(buffer)


_COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
import gpu_gather_rival as rival, gpu_read as read

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
    done = _run("-c", _COMPILE)
    assert done.stdout.strip() == "compiled", done.stderr


# --- scheduling, by workers that are made up

_WORKER = """
import json, sys, time
lines, plan = open(sys.argv[1], "a"), json.load(open(sys.argv[2]))
def say(**facts):
    lines.write(json.dumps(facts) + "\\n"); lines.flush()
for name in plan["cases"]:
    if time.time() + 1 > plan["until"]:
        say(left_out=name); continue
    for variant in ("dense", "compact:cuda"):
        if variant in plan["skip"].get(name, []): continue
        say(doing=[name, variant])
        if variant == "compact:cuda" and "opt" in name and "M 16" in name:
            if "lost" in sys.argv[3]: say(broken=[name, "an illegal address"], lost=True); sys.exit(3)
            if "hang" in sys.argv[3]: time.sleep(60)
    row = {"case": name, "kind": "few", "failed": {}, "variants": {}, "keep": 0.5, "tokens": 16, "model": "x"}
    say(row=row, done=name)
"""


def _scheduled(load: Load, folder: Path, how: str, seconds: float = 60, words: str = "few") -> dict[str, Any]:
    script, bench, cases = folder / "worker.py", load("bench_gpu"), load("gpu_cases")
    script.write_text(_WORKER)
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
    monkeypatch.setattr(load("bench_gpu"), "PATIENCE", 0.5)
    result = _scheduled(load, tmp_path, "hang")
    assert result["state"] == "complete" and len(result["rows"]) == 14
    assert "silent for" in json.dumps(result["broken"])


def test_a_budget_leaves_the_last_cases_out(load: Load, tmp_path: Path) -> None:
    result = _scheduled(load, tmp_path, "well", seconds=0.5)
    assert result["state"] == "complete" and len(result["left_out"]) == 14 and result["rows"] == []


def test_first_cases_first_then_what_they_had_no_time_for(load: Load, tmp_path: Path) -> None:
    bench, cases = load("bench_gpu"), load("gpu_cases")
    (tmp_path / "worker.py").write_text(_WORKER)
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
    bench, cases = load("bench_gpu"), load("gpu_cases")
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
    timing = load("gpu_timing")
    assert timing.repeats(2, 80e-6) == 13 and timing.repeats(2, 1.0) == 1
    assert timing.repeats(114, 3e-6) == 6 and timing.repeats(600, 1e-6) == 1


def test_a_box_ends_what_runs_too_long(load: Load, tmp_path: Path) -> None:
    boxed = load("boxed")
    box = boxed.Box.start(
        [sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"], tmp_path / "a.log", 1
    )
    assert box.wait() == boxed.TIMED_OUT and box.seconds < 20
    assert boxed.tail(tmp_path / "a.log") == "on"


# --- stages


def test_without_a_gpu_nothing_is_done(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, stages = load("gpu"), load("gpu_stages")
    monkeypatch.setattr(stages, "devices", lambda: 0)
    for name in ("fresh_logs", "probe", "build", "warm"):
        monkeypatch.delattr(stages, name)
    assert driver.main([]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "needs an NVIDIA GPU" in said and "nothing was built" in said


def test_a_python_that_will_not_do_is_refused(load: Load) -> None:
    unfit = load("gpu").unfit
    assert "has none that can be imported (no torch)" in unfit({"torch": None, "why": "no torch"}, False)
    assert "does not" in unfit({"torch": "2.11", "sees": False, "pyprune": True}, False)
    assert "cannot be imported" in unfit({"torch": "2.11", "sees": True, "pyprune": False, "why": "x"}, False)
    assert unfit({"torch": "2.11", "sees": True, "pyprune": True}, False) is None


def test_the_order_where_there_is_a_gpu(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command replaced by one that only says when it ran."""
    driver, bench, stages, testing, boxed = map(load, ("gpu", "bench_gpu", "gpu_stages", "gpu_tests", "boxed"))
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "worker.py").write_text(_WORKER)
    ran: list[str] = []

    def box(name: str, many: bool = False) -> Any:
        def start(*_: Any, **__: Any) -> Any:
            ran.append(name)
            found = boxed.Box.start([sys.executable, "-c", f"print('{name}')"], logs / f"{name}.log", 20)
            return [found] if many else found

        return start

    for name in ("probe", "build"):
        monkeypatch.setattr(stages, name, box(name))
    monkeypatch.setattr(stages, "warm", box("warm", True))
    monkeypatch.setattr(testing, "tests", box("tests", True))
    monkeypatch.setattr(testing, "sanitizer", box("sanitizer"))
    facts = {"torch": "2.11", "sees": True, "pyprune": True, "pytest": True, "capability": [9, 0]}
    monkeypatch.setattr(stages, "probe_facts", lambda *_: facts)
    command = lambda *files: [sys.executable, str(tmp_path / "worker.py"), *map(str, files), "well"]  # noqa: E731
    monkeypatch.setattr(bench.Schedule.__init__, "__defaults__", (command, *bench.Schedule.__init__.__defaults__[1:]))
    for quick, wanted in (
        (False, ["probe", "build", "warm", "first cases", "tests", "sanitizer", "other cases"]),
        (True, ["probe", "build", "warm", "tests", "first cases"]),
    ):
        ran.clear()
        report = bench.Report(tmp_path / "gpu.json", {})
        run = driver.Run(report, logs, None, 300, False)
        assert run.all(load("gpu_cases").all_cases(), quick) is None
        assert list(run.stages) == wanted and not driver.failures(run.stages)
        assert ran == ["probe", "warm", "build", "tests", *([] if quick else ["sanitizer", "warm"])]
        kinds = {row["case"] for row in report.result["rows"]}
        assert len(kinds) == (8 if quick else len(load("gpu_cases").all_cases()))


def test_an_unfit_python_leaves_the_last_result(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, bench, stages = load("gpu"), load("bench_gpu"), load("gpu_stages")
    result = tmp_path / "results" / "gpu.json"
    result.parent.mkdir()
    result.write_text("the last one")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(bench, "RESULT", result)
    monkeypatch.setattr(driver, "refusal", lambda dry: None)
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
    monkeypatch.setattr(stages, "fresh_logs", lambda dry: tmp_path)
    monkeypatch.setattr(stages, "_ASK", 'print(\'{"torch": null, "why": "none"}\')')
    assert driver.main([]) == 2 and result.read_text() == "the last one"


def test_tests_and_sanitizer_are_recorded(load: Load, tmp_path: Path) -> None:
    testing, boxed = load("gpu_tests"), load("boxed")
    log = tmp_path / "tests-0.log"
    outcomes = [
        {"id": "a", "outcome": "passed", "seconds": 1.0, "message": ""},
        {"id": "b", "outcome": "failed", "seconds": 2.0, "message": "wrong"},
        {"id": "c", "outcome": "skipped", "seconds": 0.0, "message": "x\nSkipped: no gguf"},
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outcomes))
    box = boxed.Box.start([sys.executable, "-c", "print('Device not supported'); raise SystemExit(1)"], log, 60)
    code = box.wait()
    facts = testing.tests_facts([box, box], [5, code])
    assert facts["code"] == 1 and testing.tests_facts([box, box], [5, 0])["code"] == 0
    assert facts["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and facts["skipped"] == {"Skipped: no gguf": 1}
    assert facts["failed"] == [{"id": "b", "message": "wrong"}] and facts["slowest"][0] == ["b", 2.0]
    assert testing.sanitizer_facts(box, code)["why"].endswith("does not work on this device")
    assert testing.sanitizer_facts(box, 9)["verdict"] == "none"
    assert testing.sanitizer_facts(None, None)["verdict"] == "none"
    assert testing.sanitizer_facts(box, 0)["verdict"] == "clean"
    well = {"build": {"code": 0}, "tests": {"code": None}, "first cases": {"code": 0}, "sanitizer": {"verdict": "none"}}
    assert load("gpu").failures(well) == []
    wrong = {**well, "tests": facts, "sanitizer": {"verdict": "errors"}}
    assert load("gpu").failures(wrong) == ["tests", "sanitizer"]
    assert testing.test_files(True) == ["tests/test_gpu.py"]
    assert testing.test_files(False)[0] == "tests/test_gpu.py"
    assert "tests/test_triton_kernels.py" in testing.test_files(False)


def test_processes_share_the_tests(load: Load, tmp_path: Path) -> None:
    """Every test once, whoever runs it."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test(i): pass\n"
    )
    told = tmp_path / "outcomes.jsonl"
    for share in range(3):
        command = [
            "-m",
            "pytest",
            str(tmp_path),
            "-q",
            "-p",
            "gpu_outcomes",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
        ]
        done = _run(*command, PYPRUNE_OUTCOMES=str(told), PYPRUNE_SHARE=f"{share} 3")
        assert done.returncode == 0, done.stdout
    ids = [json.loads(line)["id"] for line in told.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 7


def test_a_library_built_beforehand_is_told_from_a_compiled_one(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, boxed, driver = load("gpu_stages"), load("boxed"), load("gpu")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(
        stages, "_BUILD", "import os; print(os.environ['PYPRUNE_PREBUILT'], os.environ['PYPRUNE_CUDA_ARCHS'])"
    )
    monkeypatch.setattr(stages, "architecture", lambda capability: "90")
    monkeypatch.delenv("PYPRUNE_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("PYPRUNE_PREBUILT", raising=False)
    box = stages.build(tmp_path, [9, 0])
    assert box.wait() == 0 and boxed.tail(box.log) == f"{tmp_path / 'pyprune'} 90"
    (tmp_path / "pyprune").mkdir()
    record = {"cpu": {"built": True}, "cuda": {"built": True, "taken": True, "sources": {}}}
    (tmp_path / "pyprune" / "native.json").write_text(json.dumps(record))
    facts = stages.build_facts(box, 0)
    assert facts["taken"] == {"cpu": False, "cuda": True} and facts["cuda"] == {"built": True, "taken": True}
    assert driver.outcome(facts) == "code 0, cpu compiled, cuda taken"
    with box.log.open("a") as log:
        log.write("native CUDA library in PYPRUNE_PREBUILT=x not taken: it was built from other sources\n")
    assert "other sources" in stages.build_facts(box, 1)["not_taken"][0]


def test_the_architecture_of_a_device(load: Load) -> None:
    find = load("gpu_stages").architecture
    assert (find([9, 0]), find([8, 7]), find([7, 5]), find(None)) == ("90", "80", None, None)


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
        _row("contextual", gather=60, contextual=66),
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
    judged = load("goals_gpu").judge(_result())
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
    assert _goal(judged, "contextual")["met"] is None
    assert _goal(judged, "whole model")["met"] is True


def test_a_time_that_overlaps_is_called_so(load: Load) -> None:
    row = _row(dense=100, compact=60, gather=61) | {"between_us": 2.0}
    row["variants"]["compact:cuda #2"] = {"us": 45.0, "gb_s": 3900.0, "apart_us": 57.5, "programmatic_edges": 1}
    row["variants"]["compact:cuda #2"]["plan"] = {"overlap": 1, "early": 0, "bulk": 1}
    result = _result() | {"rows": [row]}
    best = _goal(load("goals_gpu").judge(result), "decode M = 1, keep 1.0")["cases"][0]["best"]
    assert best["variant"] == "compact:cuda #2, overlapping its own next call"
    (cells,) = load("gpu_tables").overlap_rows(result)
    assert cells[1:] == ["compact:cuda #2", "overlap, bulk", "45.00", "57.50", "2.00", "1"]


def test_goals_of_a_run_that_was_cut_short(load: Load) -> None:
    goals = load("goals_gpu")
    judged = goals.judge({"rows": [], "models": []})
    assert all(goal["met"] is None and goals.cells(goal)[2] == "not measured" for goal in judged)
    row = _row(dense=100, gather=60)
    row["failed"]["compact"] = "wrong result: error 1"
    over = _goal(goals.judge({"rows": [row]}), "decode M = 1", "best dense")
    assert over["met"] is False and goals.cells(over)[3] == "failed"
    model = _result()["models"][0] | {"in_graph": False}
    assert _goal(goals.judge({"models": [model]}), "whole model")["met"] is False


def test_table_for_readme(load: Load, tmp_path: Path) -> None:
    tables = load("readme_tables")
    readme = "<!-- table:gpu -->\nold\n<!-- /table -->\n"
    assert tables.render(readme, tmp_path) == "<!-- table:gpu -->\n<!-- /table -->\n"
    result = _result() | {"machine": load("pyprune.machine").facts(), "bandwidth_gb_s": 4000.0}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    made = tables.render(readme, tmp_path)
    assert (
        "| llama-3-8b 4096 x 14336 | bfloat16 | 1 | 50% | 100 | - | - | 60.00 | cuda | 61.00 | cuda | 3,333 | 83% |"
        in made
    )
    assert "not measured" in made and "Memory read at 4,000 GB/s (sum)" in made and "| LLaMA, 32 layers | 50% |" in made
    (tmp_path / "gpu.json").write_text(json.dumps({"state": "no worker comes to work", "rows": []}))
    assert "Nothing was measured" in tables.render(readme, tmp_path)
