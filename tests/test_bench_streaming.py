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
    assert small.fit == pytest.approx(2 * (2 * 16 * 20 * 10 + 16**3 / 3 + 2 * 16 * 16 * 10 + 6 * 20 * 20 * 10))
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
    log = [{"layers_done": 0}, {"layers_done": 3}]
    killed = {"kills": 2, "layers": 5, "runs_that_ended_and_were_equal": 1, "log": log, "machine": FACTS}
    assert tables["killed"](killed)[0].startswith("2 kills of runs over 5 layers, 1 of them with layers done already")
    rates = tables["rates"]({"machine": FACTS, "products": {"bfloat16": 4e11, "float32": 2e11, "float64": 1e11}})
    assert sum(line.startswith("| 70B dense |") for line in rates) == 4


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.streaming.kill", "--kills", "3", "--results", str(tmp_path / "log.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "log.json").read_text())["kills"] == 3
