"""The bench of streamed runs: what it makes, its tables, the figures on paper by hand; and, slow, a few kills."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
FACTS = {
    "gpu": None,
    "cpu": "a CPU",
    "torch_threads": 2,
    "commit": None,
    "versions": {"torch": "2.13"},
    "date": "2026-11-27T00",
    "load": 0.1,
}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_a_checkpoint_of_a_size_loads(tmp_path: Path) -> None:
    made = importlib.import_module("bench.streaming.make").make(tmp_path / "made", 0.02, 128, 352)
    held = sum(file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors"))
    assert held == pytest.approx(0.02e9, rel=0.05)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.dtype == torch.bfloat16 and len(model.model.layers) == made.num_hidden_layers
    assert float(model.lm_head.weight.float().std()) == pytest.approx(128**-0.5, rel=0.02)


def test_the_figures_on_paper() -> None:
    paper = importlib.import_module("bench.streaming.paper")
    dense, mixture = paper.MODELS
    assert 69e9 < dense.weights < 72e9 and 395e9 < mixture.weights < 405e9
    small = paper.Model("small", layers=2, hidden=10, width=20, attention=50, tokens=100, other=7)
    assert small.weights == 7 + 2 * (50 + 3 * 10 * 20)
    assert small.read == 2 * small.weights
    assert small.written == pytest.approx(2 * (small.weights - 0.2 * 2 * 600) + 2 * 2 * 2 * 100 * 10)
    assert small.forward == 3 * 2 * 100 * 2 * 650
    assert small.moments == 2 * 100 * 2 * 20 * 30
    assert small.fit == pytest.approx(2 * (2 * 20 * 20 * 10 + 16**3 / 3 + 2 * 16 * 16 * 10 + 2 * 4 * 4 * 10))
    assert small.reduced == 8 * 2 * 20 * 30
    place = paper.Machine("one", disk=10, low=100, single=1000, double=10_000, network=1e5)
    assert place.seconds(small)["forwards"] == small.forward / 100
    assert place.seconds(small)["network"] == 2 * small.reduced / 1e5


def test_tables() -> None:
    tables = importlib.import_module("bench.tables.readme").TABLES
    run = {"peak_rss_bytes": 8e8, "seconds": 34.0, "bytes_per_second": 8.3e7, "share_of_copy": 0.95}
    shape = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 2816}
    one = {"shape": shape, "copy": {"bytes_per_second": 8.7e7}, "limit_bytes": 4e9, "machine": FACTS}
    runs = {"magnitude": {**run, "in_memory": {"peak_rss_bytes": 2.5e9}, "equal_to_the_bit": True}, "wanda": run}
    table = "\n".join(tables["streaming"]({"1.5GB": {**one, "runs": runs}}))
    assert "| magnitude | 4 GB | 0.80 GB | 2.50 GB | 34 s | 83 MB/s | 95% | yes |" in table
    assert "| wanda | 4 GB | 0.80 GB | - | 34 s | 83 MB/s | 95% | not compared |" in table
    later = {**FACTS, "date": "2027-01-02", "load": 9.5}
    runs["wanda"] = {**run, "seconds": 6000.0, "machine": later, "copy": {"bytes_per_second": 5e7}}
    table = "\n".join(tables["streaming"]({"1.5GB": {**one, "runs": runs}}))
    assert "| wanda | 4 GB | 0.80 GB | - | 100 min |" in table
    assert table.count("1.5GB: a copy ") == 2 and "a copy 50 MB/s read and written; load before 9.5" in table
    log = [{"after_seconds": 2.2, "layers_before": n, "layers_done": done} for n, done in enumerate((0, 3))]
    killed = {"kills": 2, "layers": 5, "runs_that_ended_and_were_equal": 1, "log": log, "machine": FACTS}
    assert tables["killed"](killed)[0].startswith("2 kills of runs over 5 layers, 1 of them with layers done already")
    assert tables["killed"](killed)[-1] == "| 2 | 2.2 s | 1 | 3 |"
    row, shape = {"seconds": 30.0, "peak_bytes": 2e8}, {**shape, "tokens": 4096}
    times = {"one": [row, {**row, "seconds": 31.0}], "several": [{**row, "seconds": 20.0}]}
    told = {"speedup_seconds": 1.5, "speedup_cpu_seconds": 1.6, "same_neurons": True, "largest_difference": 1.23e-6}
    ranks = {"processes": 2, "device": "cpu", "shape": shape, "machine": FACTS, "runs": {"wanda": {**times, **told}}}
    lines = tables["ranks"]({"cpu 2": ranks, "cpu 3": {**ranks, "processes": 3}})
    assert lines[2] == "| 2, cpu | wanda | 30.0 s | 20.0 s | 1.50x | 1.60x | 200 MB | 200 MB | the same | 1e-06 |"
    assert lines[3].startswith("| 3, cpu | wanda |") and len(lines) == 6
    rates = tables["rates"]({"machine": FACTS, "products": {"bfloat16": 4e11, "float32": 2e11, "float64": 1e11}})
    assert sum(line.startswith("| 70B dense |") for line in rates) == 4


def test_two_processes_against_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module("bench.streaming.ranks")
    sizes = ["--hidden", "128", "--intermediate", "192", "--layers", "2", "--windows", "2", "--repeats", "1"]
    name, out = "wanda + least squares", tmp_path / "ranks.json"
    asked = [*sizes, "--only", name, "--results", str(out)]
    for gpus, nccl, message in ((1, True, "cuda, of which there are 1"), (2, False, "cpu where torch has no NCCL")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda count=gpus: count)
            patch.setattr(torch.distributed, "is_nccl_available", lambda there=nccl: there)
            with pytest.raises(SystemExit):
                bench.main([*asked, "--device", "cuda"])
        assert message in capsys.readouterr().err and not out.exists()
    bench.main(asked)
    found = json.loads(out.read_text())["cpu 2"]
    row = found["runs"][name]
    assert row["same_neurons"] and row["largest_difference"] < 1e-4 and len(row["one"]) == len(row["several"]) == 1
    assert found["shape"]["tokens"] == 1024 and min(row["one"][0]["seconds"], row["several"][0]["seconds"]) > 0


def test_a_rehearsal_of_the_gpu(tmp_path: Path) -> None:
    bench = importlib.import_module("bench.streaming.gpu")
    out, place = tmp_path / "result.json", tmp_path / "place"
    sizes = ["--gb", "0.0175", "--hidden", "128", "--intermediate", "352", "--windows", "5", "--window", "64"]
    bench.main([str(place), *sizes, "--device", "cpu", "--compare", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["errors"] == {} and not place.exists()
    assert found["make"]["num_hidden_layers"] == found["make"]["layers_asked"] >= 2
    for name, run in bench.RUNS.items():
        row = found[name]
        assert found["compared"]["runs"][name]["equal_to_the_bit"]
        fits = {"fit", "moments", "statistics", "forward, cut", "forward, dense", "embedding", "scores"}
        assert fits <= row["phases"].keys() if run["repair"] else not fits - {"scores"} & row["phases"].keys()
        assert 0 < row["phases"]["write: hash and file"] <= row["phases"]["write"] < row["seconds"]
        assert row["bytes_read"] > row["bytes_written"] > 0 and row["host_peak_bytes"] > row["host_growth_bytes"] >= 0
        assert (row["tokens"] == 5 * 64) == bool(run["repair"]) == ("fits" in row["floor"])
    slow = {"read": 1e8, "write": 1e8}
    assert bench.seconds(15, 33, 1.0, slow) == pytest.approx(25 + 150 + 255 + 255)
    config = {"intermediate_size": 10, "hidden_size": 4, "num_hidden_layers": 2}
    least = bench.floor(config, 10**8, 5 * 10**7, slow, 100)
    assert least["reading"] == 1 and least["writing"] == 0.5
    assert least["forwards and moments"] == pytest.approx(2 * 200 * (120 + 2.7 * 120 + 10 * 9) / bench.LOW)
    assert least["fits"] == pytest.approx(2 * (560 + 343 / 3 + 392 + 3200) / bench.DOUBLE)


def test_an_error_on_the_gpu_ends_its_step_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("bench.streaming.gpu")
    limits: list[float | None] = []
    stream = bench._stream

    def small(folder: Path, out: Path, name: str, asked: Any, config: Any, limit: float | None) -> Any:
        limits.append(limit)
        if name != "magnitude" or len(limits) < 3:
            raise torch.OutOfMemoryError("too much")
        return stream(folder, out, name, asked, config, limit)

    monkeypatch.setattr(bench, "_stream", small)
    sizes = ["--gb", "0.0175", "--hidden", "128", "--intermediate", "352", "--limit-gb", "4"]
    found = bench.main([str(tmp_path / "place"), *sizes, "--device", "cpu"])
    assert [row["limit_bytes"] for row in found["magnitude"]["too_small"]] == [4e9, 6e9]
    assert found["magnitude"]["limit_bytes"] == 9e9 and limits == [4e9, 6e9, 9e9, 4e9, 6e9, 9e9]
    assert list(found["errors"]) == ["wanda + least squares"] and not (tmp_path / "place").exists()


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.streaming.kill", "--kills", "3", "--results", str(tmp_path / "log.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "log.json").read_text())["kills"] == 3
