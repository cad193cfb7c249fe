"""Pruning beside quantisation: rows of tiny models by hand, what is refused, bases of GGUF files, table and figure."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from gguf_cases import write_dense

from pyprune import InputError, accelerate, prune
from pyprune.evaluation.perplexity import window_losses
from pyprune.model import checkpoint, loading, provenance
from pyprune.serving.gguf_base import Base
from pyprune.serving.gguf_export import to_gguf


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # as when the script is run
    module, files = importlib.import_module("bench.model.worth"), importlib.import_module("bench.model.worth_files")
    monkeypatch.setattr(files, "LLAMA_BIN", tmp_path / "no-engine")
    for one in (module, files):
        monkeypatch.setattr(one, "CHECKPOINTS", ("dense", "removed-50", "recovered-50"))
    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "PROMPT", 4)
    return module


@pytest.fixture
def options(bench: Any, tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    model = loading.load_model(str(tiny_checkpoint))
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    checkpoint.save(model, tmp_path / "half")
    return {
        "work": tmp_path / "work",
        "data": None,
        "quality_": True,
        "latency": False,
        "checkpoint": [f"removed-50={tmp_path / 'half'}"],
        "only": "*-50/*",
        "tokens": 256,
        "window": 128,
        "quiet": 1.0,
        "model": str(tiny_checkpoint),
        "out": tmp_path / "worth.json",
    }


def test_rows_say_what_is_served(bench: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    both = {**options, "only": "[dr]e[nm]*", "latency": True}
    bench.main(**both)
    text = options["out"].read_text()
    result = json.loads(text)
    assert str(options["work"].parent) not in text and result["model"] == "tiny-llama"
    rows = {(row["checkpoint"], row["weights"]): row for row in result["rows"]}
    assert list(rows) == [(label, kind) for label in ("dense", "removed-50") for kind in ("bf16", "int8", "int4")]
    # By hand: D 32, F 96 and 48 in 3 layers, int8 with a float32 and 32 of int4 with a bfloat16 scale, and in both a
    # bfloat16 scale for each channel.
    for label, width in (("dense", 96), ("removed-50", 48)):
        for kind, part in (("bf16", 64), ("int8", 32 + 4), ("int4", 16 + 2)):
            row = rows[label, kind]
            assert row["ffn_bytes"] == 3 * width * 3 * part
            channels = 0 if kind == "bf16" else 3 * 32 * 2
            assert row["bytes"] - row["ffn_bytes"] == rows["dense", "bf16"]["bytes"] - 3 * 96 * 3 * 64 + channels
            assert row["bytes"] - row["read_bytes"] == (1024 - 1) * 32 * 2, "one row of the input embedding is read"
            assert row["step_ms"]["p50"] > 0 and row["anchor_ms"]["p50"] > 0 and row["timed"]["cpu"]
    # What is judged is the quantised weights: an ordinary model that holds them, written out, loses as much.
    windows = bench.domain_windows(loading.load_tokenizer(options["model"]), bench.read_material().domains, 256, 128)
    for (label, kind), row in rows.items():
        path = options["model"] if label == "dense" else options["checkpoint"][0].partition("=")[2]
        stock = loading.load_model(path, "bfloat16")
        if kind != "bf16":
            assert list(row["losses"].values()) != list(rows[label, "bf16"]["losses"].values())
            fast = accelerate(loading.load_model(path, "bfloat16"), weights=kind, measure=False)
            stock.load_state_dict(fast.state_dict())
        for name, ids in windows.items():
            wanted = (window_losses(stock, ids) / 127).tolist()
            assert row["losses"][name] == pytest.approx(wanted, abs=0.01), (label, kind)
    assert rows["removed-50", "bf16"]["made"]["recovery"] == []
    # What was measured is not measured again, what is missing is; rows on other texts are not mixed in.
    result["rows"][0]["losses"] = {"python-docs": [7.0], "python-source": [7.0]}
    del result["rows"][4]
    options["out"].write_text(json.dumps(result))
    bench.main(**both)
    again = json.loads(options["out"].read_text())["rows"]
    assert again[0]["losses"]["python-docs"] == [7.0]
    assert again[4]["losses"] == rows["removed-50", "int8"]["losses"] and "step_ms" in again[4]
    with pytest.raises(InputError, match="out must hold rows judged on the same texts"):
        bench.main(**{**both, "window": 64})
    with pytest.raises(InputError, match=r"model must be that of worth\.json; got 'demo'"):
        bench.main(**{**both, "model": "demo"})
    # Beside other work nothing is timed.
    monkeypatch.setattr(bench.psutil, "cpu_percent", lambda interval: 40.0)
    with pytest.raises(typer.Exit):
        bench.main(**{**both, "quality_": False, "quiet": 0.3, "out": options["work"] / "new.json"})
    assert not (options["work"] / "new.json").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quality_": False}, "quality must be asked for, or latency, or both"),
        ({"only": "nothing"}, "only must fit a row"),
        ({"checkpoint": ["removed-50"]}, "checkpoint must be LABEL=PATH"),
        ({"checkpoint": ["removed-51=."]}, r"checkpoint must be one of .*removed-50"),
        ({"checkpoint": ["removed-50=nowhere"]}, "checkpoint must name an existing folder for removed-50"),
        ({"data": Path("nowhere")}, "data must be an existing folder"),
    ],
)
def test_refusals(bench: Any, options: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bench.main(**{**options, **given})
    assert not options["out"].exists()


def test_checkpoints_are_made_by_the_verb(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(
        bench.Files.checkpoint.__globals__["subprocess"], "run", lambda command, check: ran.append(command)
    )
    files = bench.Files.of("demo", tmp_path, [])
    assert files.checkpoint("dense") == "demo" and files.checkpoint("removed-30") == str(tmp_path / "removed-30")
    files.checkpoint("recovered-50")
    start = [sys.executable, "-m", "pyprune", "prune", "demo", "--keep"]
    assert ran == [
        [*start, "0.7", "--out", str(tmp_path / "removed-30")],
        [*start, "0.5", "--best", "--out", str(tmp_path / "recovered-50")],
    ]


def test_a_recovered_checkpoint_becomes_its_own_base(bench: Any, tiny: Callable[..., Any], tmp_path: Path) -> None:
    files = importlib.import_module("bench.model.worth_files")
    model = tiny("llama")
    dense = write_dense(model, tmp_path / "dense.gguf", "bf16")
    prune(model, keep=2 / 3, method="random", allocation="uniform:multiple=8", repair=None)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    provenance.add_recovery(model, {"steps": 1})
    with pytest.raises(InputError, match="base must be the dense model of this checkpoint"):
        to_gguf(model, dense, tmp_path / "out.gguf")
    files.own_base(model, dense, tmp_path / "own.gguf")
    to_gguf(model, tmp_path / "own.gguf", tmp_path / "out.gguf")
    found = loading.load_model(str(tmp_path / "out.gguf"), "bfloat16").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    size = files.gguf_sizes(tmp_path / "out.gguf")
    tensors = Base(tmp_path / "out.gguf").tensors
    assert size["ffn_bytes"] == 3 * 3 * 64 * 32 * 2 and size["bytes"] < size["file_bytes"]
    apart = tensors["token_embd.weight"].n_bytes * 127 // 128 if "output.weight" in tensors else 0
    assert size["bytes"] - size["read_bytes"] == apart


def _row(name: str, weights: str, loss: float, size: int, ms: float | None, engine: str = "pyprune") -> dict[str, Any]:
    stamp = {"cpu": "CPU", "torch_threads": 2, "load": 0.0, "commit": "abcdef0123456", "dirty": False}
    stamp["date"] = "2026-01-02T03:04:05"
    losses = [loss - 0.01, loss + 0.01] if engine == "pyprune" else [loss]
    row = {"checkpoint": name, "engine": engine, "weights": weights, "bytes": size, "ffn_bytes": size // 2}
    row |= {"made": {"tokens": 1000, "recovery": []}, "losses": {"a": losses, "b": losses}, "judged": stamp}
    return row if ms is None else row | {"step_ms": {"p50": ms}, "anchor_ms": {"p50": 10.0}, "timed": stamp}


def test_table_and_figure(bench: Any, tmp_path: Path) -> None:
    tables = importlib.import_module("bench.tables.worth")
    rows = [
        _row("dense", "bf16", 2.0, 100_000_000, 10.0),
        _row("dense", "int8", 2.0, 60_000_000, 5.0),
        _row("removed-50", "bf16", 2.0 + math.log(1.5), 70_000_000, 8.0),
        _row("removed-50", "int8", 2.0 + math.log(1.6), 40_000_000, 6.0),
        _row("recovered-50", "int8", 2.0 + math.log(1.2), 40_000_000, None),
        _row("dense", "q8_0", 2.0 + math.log(1.1), 50_000_000, 4.0, "llama.cpp"),
        {"checkpoint": "removed-50", "engine": "llama.cpp", "weights": "q8_0"},
    ]
    texts = {"tokens": 4096, "window": 512, "domains": {"a": "x", "b": "y"}}
    result = {"suite": "worth", "model": "demo", "texts": texts, "rows": rows}
    lines = tables.worth_table(result)
    assert "2 domains, 4096 tokens of each in windows of 512" in lines[0]
    assert "Time: CPU, 2 threads, 2026-01-02, commit abcdef0123." in lines[0]
    body = lines[4:-2]
    assert len({line.count("|") for line in lines[2:-2]}) == 1
    none = "  |" * 5
    assert body == [
        "| dense | bf16 | 100.0 | 50% | 1.000 | 10.0 | 1.00x |" + none,
        # Twice as fast as dense bf16 and as good: nothing that was pruned and not taught is worth it here.
        "| dense | int8 / q8_0 | **60.0** | 50% | 1.000 (1.000 to 1.000) | **5.0** | 2.00x "
        "| **50.0** | 50% | 1.100 | **4.0** | 2.50x |",
        "| 50 % removed | bf16 | 70.0 | 50% | 1.500 (1.500 to 1.500) | 8.0 | 1.25x |" + none,
        "| 50 % removed | int8 | 40.0 | 50% | 1.600 (1.600 to 1.600) | 6.0 | 1.67x |" + none,
        "| 50 % removed, recovered | int8 | **40.0** | 50% | 1.200 (1.200 to 1.200) |  |  |" + none,
    ]
    assert lines[-1].startswith("Calibration. dense: 1,000 tokens; 50 % removed: 1,000 tokens")
    # What is not measured yet has no column.
    bare = [
        {k: v for k, v in row.items() if k not in ("step_ms", "timed")} for row in rows if row["engine"] == "pyprune"
    ]
    header = tables.worth_table({**result, "rows": bare})[2]
    assert header == "| model | weights | MB, ours | in FFNs, ours | over dense, ours |"
    (tmp_path / "worth.json").write_text(json.dumps(result))
    tables.main(tmp_path / "worth.json", tmp_path / "worth.svg")
    drawn = (tmp_path / "worth.svg").read_text()
    assert drawn.startswith("<?xml") and "llama.cpp" in drawn and "q8_0" in drawn
    with pytest.raises(InputError, match="result must hold dense in bf16 by pyprune"):
        tables.worth_table({**result, "rows": rows[1:]})
