"""bench/gpu/job.py without a GPU: a rehearsal of the whole command, what comes back of it and when, its stages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_bench import BENCH, WORKER, Load, environment, load, run

__all__ = ["load"]


# --- the rehearsal: the whole command on a CPU


def _command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.job", "--dry-run", *arguments],
        env=environment(OUT=str(folder)),
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
    if load("bench.gpu.plans").simulator() is not None:
        names = {c.name for c in load("bench.gpu.cases").all_cases() if c.kind in ("decode", "small", "int8")}
        assert names <= set(stages["plans"]["cases"])
        assert all(len(plans) > 3 for plans in stages["plans"]["cases"].values())
    assert {"gpu.json", "tests.log", "outcomes.jsonl"} <= {file.name for file in folder.iterdir()}


def test_the_result_grows_by_case_and_stage(rehearsed: tuple[list[dict[str, Any]], str, Path]) -> None:
    seen, _, _ = rehearsed
    rows = [len(result.get("rows", [])) for result in seen]
    # Looked at every 50 ms; a busy machine shows fewer of its states.
    assert rows == sorted(rows) and len(set(rows)) > 3
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
from bench.gpu import output as gpu_output
Path.replace = lambda *_: os._exit(9)
gpu_output.place("new", Path(sys.argv[1]) / "gpu.json", Path(sys.argv[2]))
"""


def test_a_kill_between_writing_and_renaming(load: Load, tmp_path: Path) -> None:
    out, work, output = tmp_path / "out", tmp_path / "work", load("bench.gpu.output")
    output.place("old", out / "gpu.json", work)
    assert run("-c", _KILLED, str(out), str(work)).returncode == 9
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "old"}
    output.place("new", out / "gpu.json", work)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"gpu.json": "new"} and not list(work.iterdir())


def test_on_another_file_system_it_is_written_beside(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, output, rename = tmp_path / "out", load("bench.gpu.output"), Path.replace

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
    output = load("bench.gpu.output")
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
    names = {c.name for c in load("bench.gpu.cases").dry_cases() if c.kind not in ("model", "inductor")}
    assert {row["case"] for row in result["rows"]} == names
    for row in result["rows"]:
        wanted = {"dense", "compact", "compact:torch", "compact:cpu"}
        all_kept = row["keep"] == 1
        wanted |= set() if all_kept else {"compact cublas"}
        wanted |= {"int8"} if row["kind"] == "int8" else set() if all_kept else {"gather"}
        assert wanted <= set(row["variants"])
        assert all("Error" not in why for why in row["failed"].values()), row["failed"]
        ours = ("gather", "int8")
        for name, entry in row["variants"].items():
            assert entry["us"] == entry["us_quantiles"]["p50"] > 0 and entry["samples"] == 4
            assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["us"] / 1e3)
            separable = {"compact:cpu", "int8:cpu", "gather:cpu"} if row["tokens"] <= 16 else set()
            assert ("apart_us" in entry) == (name in separable)
            assert ("error" in entry) == (name.split(":")[0] == "compact" or name.split(":")[0].split()[0] in ours)
    assert any(entry["sets"] > 1 for entry in result["rows"][0]["variants"].values())
    assert {len(result["inductor"]), len(load("bench.gpu.cases").INDUCTOR)} == {4}
    assert all(entry["us"] > 0 for entry in result["inductor"].values())
    (model,) = result["models"]
    assert set(model["models"]) == {"dense", "narrow", "accelerated"} and model["share_of_ceiling"] > 0
    assert result["bandwidth_gb_s"] == result["ceilings"]["read"]["gb_s"] > 0
    assert all(goal["cases"] or goal["name"].startswith(("small", "two-kernel", "2:4")) for goal in result["goals"])
    assert "GB/s" in said and "Amdahl" in said


# --- stages


def test_without_a_gpu_nothing_is_done(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, stages = load("bench.gpu.job"), load("bench.gpu.stages")
    monkeypatch.setattr(stages, "devices", lambda: 0)
    for name in ("fresh_logs", "probe", "build", "warm"):
        monkeypatch.delattr(stages, name)
    assert driver.main([]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "needs an NVIDIA GPU" in said and "nothing was built" in said


def test_a_python_that_will_not_do_is_refused(load: Load) -> None:
    unfit = load("bench.gpu.job").unfit
    assert "has none that can be imported (no torch)" in unfit({"torch": None, "why": "no torch"}, False)
    assert "does not" in unfit({"torch": "2.11", "sees": False, "pyprune": True}, False)
    assert "cannot be imported" in unfit({"torch": "2.11", "sees": True, "pyprune": False, "why": "x"}, False)
    assert unfit({"torch": "2.11", "sees": True, "pyprune": True}, False) is None


def test_the_order_where_there_is_a_gpu(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command replaced by one that only says when it ran."""
    driver, bench, stages, testing, boxed = map(
        load, ("bench.gpu.job", "bench.gpu.run", "bench.gpu.stages", "bench.gpu.tests", "bench.boxed")
    )
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
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
        whole = driver.Run(report, logs, None, 300, False)
        assert whole.all(load("bench.gpu.cases").all_cases(), quick) is None
        assert list(whole.stages) == wanted and not driver.failures(whole.stages)
        assert ran == ["probe", "warm", "build", "tests", *([] if quick else ["sanitizer", "warm"])]
        kinds = {row["case"] for row in report.result["rows"]}
        assert len(kinds) == (8 if quick else len(load("bench.gpu.cases").all_cases()))


def test_an_unfit_python_leaves_the_last_result(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, bench, stages = load("bench.gpu.job"), load("bench.gpu.run"), load("bench.gpu.stages")
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
    testing, boxed = load("bench.gpu.tests"), load("bench.boxed")
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
    assert load("bench.gpu.job").failures(well) == []
    wrong = {**well, "tests": facts, "sanitizer": {"verdict": "errors"}}
    assert load("bench.gpu.job").failures(wrong) == ["tests", "sanitizer"]
    assert testing.test_files(True) == ["tests/test_gpu.py"]
    assert testing.test_files(False)[0] == "tests/test_gpu.py"
    assert "tests/test_triton_kernels.py" in testing.test_files(False)


def test_processes_share_the_tests(load: Load, tmp_path: Path) -> None:
    """Every test once, whoever runs it."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test(i): pass\n"
    )
    told = tmp_path / "outcomes.jsonl"
    for share in range(2):
        command = [
            "-m",
            "pytest",
            str(tmp_path),
            "-q",
            "-p",
            "bench.gpu.outcomes",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
        ]
        done = run(*command, PYPRUNE_OUTCOMES=str(told), PYPRUNE_SHARE=f"{share} 2")
        assert done.returncode == 0, done.stdout
    ids = [json.loads(line)["id"] for line in told.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 7


def test_a_library_built_beforehand_is_told_from_a_compiled_one(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, boxed, driver = load("bench.gpu.stages"), load("bench.boxed"), load("bench.gpu.job")
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
    find = load("bench.gpu.stages").architecture
    assert (find([9, 0]), find([8, 7]), find([7, 5]), find(None)) == ("90", "80", None, None)


def test_a_box_ends_what_runs_too_long(load: Load, tmp_path: Path) -> None:
    boxed = load("bench.boxed")
    box = boxed.Box.start(
        [sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"], tmp_path / "a.log", 1
    )
    assert box.wait() == boxed.TIMED_OUT and box.seconds < 20
    assert boxed.tail(tmp_path / "a.log") == "on"
