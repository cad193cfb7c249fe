"""The engines' comparison and the drafts' on made-up answers; no test here needs an engine."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("bench.engines.run")


def test_agreement_and_table(bench: ModuleType) -> None:
    texts = [list(range(bench.NEW)) for _ in range(3)]
    wanted = {"generated": texts, "leads": [float(i) for i in range(3 * bench.NEW)], "nll": math.log(10)}
    other = [texts[0], [*texts[1][:5], -1, *texts[1][6:]], texts[2]]
    found = bench.agreement({"generated": other, "nll": math.log(11)}, wanted)
    assert (found["same"], found["of"], found["leads"]) == (2, 3, [bench.NEW + 5.0])
    assert found["perplexity"] == pytest.approx(11) and found["perplexity_ratio"] == pytest.approx(1.1)
    own = {"model": "dense", "engine": "transformers", "type": "float32", "perplexity": 10.0}
    row = {"model": "differing", "engine": "vllm", "type": "float32", "class": "vllm.a.transformers.B", **found}
    told = {"engine": "vllm", "type": "bfloat16", "what": "decode", "batch": 1}
    speed = [
        {**told, "model": name, "kernels": kernels, "tokens_per_s": rate, "neurons": neurons}
        for name, kernels, rate, neurons in (
            ("dense", "off", 50.0, 1000),
            ("differing", "off", 60.0, 700),
            ("differing", "int8", 90.0, 700),
            ("least", "off", 50 / 0.51, 20),
            ("llama-1b-half", "off", 5.0, 9),
        )
    ]
    bench.speeds.add_ceilings(speed, ["differing"])
    # Without 98 % of the neurons 51 % of the time is left, so all of them are half of it; 30 % of them are 15 %.
    (pruned,) = [row for row in speed if "ceiling" in row]
    assert (pruned["model"], pruned["kernels"], pruned["speedup"]) == ("differing", "off", pytest.approx(1.2))
    assert (pruned["removed"], pruned["ffn_share"]) == (pytest.approx(0.3), pytest.approx(0.5))
    assert (pruned["ceiling"], pruned["of_ceiling"]) == (pytest.approx(1 / 0.85), pytest.approx(1.2 * 0.85))
    facts: dict[str, Any] = {
        "gpu": None,
        "cpu": "CPU",
        "torch_threads": 1,
        "commit": "",
        "versions": {"torch": "2"},
        "date": "2026-01-02",
    }
    answer = {"id": "x", "object": "text_completion", "choices": [{"text": " it's", "finish_reason": "length"}]}
    served = {
        "machine": facts,
        "vllm": {"command": ["vllm", "serve", "d"], "request": {"prompt": "a"}, "answer": answer, "same": True},
        "llama.cpp": {"command": ["llama-completion", "-m", "d.gguf", "-p", "a b"], "text": " c", "same": True},
    }
    result: dict[str, Any] = {"machine": facts, "agreement": [own, row], "speed": speed, "served": served}
    engines = importlib.import_module("bench.tables.engines")
    table = engines.engines_table(result)
    assert "| dense | transformers | float32 |  |  | 10.000 |  |" in table
    wide = "| 30 % removed, widths differ | vllm, Transformers backend | float32 | 2 of 3 | 21.00 | 11.000 | +10.00% |"
    assert wide in table
    start = "| 30 % removed, widths differ | vllm |"
    assert f"{start} off | bfloat16 | decode | 1 | 60 | 1.20x | 50% | 1.18x | 102% |  |" in table
    assert f"{start} int8 | bfloat16 | decode | 1 | 90 | 1.80x |  |  |  | 1.50x |" in table
    assert any(line.endswith("| off | bfloat16 | decode | 1 | 5 |  |  |  |  |  |") for line in table)
    for line in (
        "$ vllm serve d",
        """{"object": "text_completion", "choices": [{"text": " it's", "finish_reason": "length"}]}""",
        "$ llama-completion -m d.gguf -p 'a b'",
        " c",
    ):
        assert line in table
    assert table[-1].startswith("Both texts are what Transformers writes")
    served["vllm"]["same"] = False
    assert engines.engines_table(result)[-1] == "Not what Transformers writes in float32: vllm."


def test_neurons_are_counted_and_the_least_model_is_made(
    bench: ModuleType, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    ceiling = importlib.import_module("bench.engines.ceiling")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    assert ceiling.neurons(tmp_path / "dense") == sum(layer.mlp.down_proj.in_features for layer in model.model.layers)
    bench.speeds.make_least(tmp_path)
    assert ceiling.neurons(tmp_path / "least") == 32 * len(model.model.layers)


def test_no_speed_beside_other_work(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(bench.speeds.psutil, "cpu_percent", lambda interval: 40.0)
    (tmp_path / bench.speeds.WIDE).mkdir()
    assert bench.speeds.measure(tmp_path, ("dense",), said.append) is None
    assert said == ["no speed: 40 % of the machine is busy with other work"]


def test_drafts_go_on_where_a_run_ended(bench: ModuleType) -> None:
    draft = importlib.import_module("bench.model.draft")
    settings = {"prompts": 2, "new_tokens": 3, "drafted": 3, "dtype": "float32"}
    quick = {"draft": "a", "match": 0.5, "per_step": 1.5}
    timed = {**quick, "draft": "b", **{f"tokens_per_s_{name}": 10.0 for name in ("alone", "drafted", "draft")}}
    result = {"settings": settings, "rows": [quick, timed]}
    assert draft.pending(result, ["a", "b", "c"], settings, speed=False) == ["c"]
    assert draft.pending(result, ["a", "b", "c"], settings, speed=True) == ["a", "c"]
    assert draft.pending(result, ["a", "b"], {**settings, "drafted": 4}, speed=False) == ["a", "b"]


def test_rows_of_both_engines(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From what the programs print, and from seconds a case: decode is what the later tokens take."""
    speed = bench.speeds
    monkeypatch.setattr(speed, "neurons", lambda folder: 7)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-q8_0.gguf").write_bytes(b"123")
        (tmp_path / name / "model.safetensors").write_bytes(b"12")
    asked: list[tuple[str, str]] = []

    def run(program: str, file: Path, threads: int, *options: object) -> str:
        asked.append((program, file.name))
        if program == "llama-batched-bench":
            return 'main: n_kv\n\n{"pl": 16, "speed_tg": 80.0}\n\n'
        return '[{"n_prompt": 512, "samples_ts": [3.0, 5.0]}, {"n_prompt": 0, "samples_ts": [2.0, 2.0]}]'

    monkeypatch.setattr(speed, "_run", run)
    rows = speed.llama(tmp_path, ("a", "b"), "q8_0", rounds=2)
    assert [name for _, name in asked[::2]] == ["a-q8_0.gguf", "b-q8_0.gguf"] * 2  # in turn
    told = [(r["model"], r["what"], r["batch"], r["tokens_per_s"], len(r["samples"]), r["bytes"]) for r in rows]
    assert told[:3] == [("a", "prefill", 1, 4.0, 4, 3), ("a", "decode", 1, 2.0, 4, 3), ("a", "decode", 16, 80.0, 2, 3)]
    assert [one[0] for one in told] == ["a"] * 3 + ["b"] * 3

    def time_vllm(request: dict[str, Any]) -> dict[str, Any]:
        seconds = [[batch * (prompt + new) / 100] * request["rounds"] for batch, prompt, new in request["cases"]]
        found = {"class": "C", "records": {}, "seconds": seconds}
        return {"threads": 2, "models": [found for _ in request["models"]]}

    monkeypatch.setattr(speed, "time_vllm", time_vllm)
    rows = speed.vllm(tmp_path, [("a", "off"), ("b", "int8")])
    assert [(r["model"], r["kernels"]) for r in rows] == [("a", "off")] * 4 + [("b", "int8")] * 4
    assert [(r["what"], r["batch"]) for r in rows[:4]] == [("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 16)]
    assert rows[0]["tokens_per_s"] == pytest.approx(512 / 5.13)
    assert all(r["tokens_per_s"] == pytest.approx(100) and r["neurons"] == 7 and r["threads"] == 2 for r in rows[1:4])
