"""The engines' comparison on made-up answers; no test here needs an engine."""

from __future__ import annotations

import importlib
import math
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
        {**told, "model": name, "kernels": kernels, "tokens_per_s": rate, "bytes": size}
        for name, kernels, rate, size in (
            ("dense", "off", 50.0, 300),
            ("differing", "off", 60.0, 200),
            ("differing", "int8", 90.0, 200),
            ("llama-1b-half", "off", 5.0, 9),
        )
    ]
    facts: dict[str, Any] = {
        "gpu": None,
        "cpu": "CPU",
        "torch_threads": 1,
        "commit": "",
        "versions": {"torch": "2"},
        "date": "2026-01-02",
    }
    result: dict[str, Any] = {"machine": facts, "agreement": [own, row], "speed": speed}
    table = importlib.import_module("bench.tables.engines").engines_table(result)
    assert "| dense | transformers | float32 |  |  | 10.000 |  |" in table
    wide = "| 30 % removed, widths differ | vllm, Transformers backend | float32 | 2 of 3 | 21.00 | 11.000 | +10.00% |"
    assert wide in table
    start = "| 30 % removed, widths differ | vllm |"
    assert f"{start} off | bfloat16 | decode | 1 | 60 | 1.20x | 1.50x |  |" in table
    assert f"{start} int8 | bfloat16 | decode | 1 | 90 | 1.80x |  | 1.50x |" in table
    assert any(line.endswith("| off | bfloat16 | decode | 1 | 5 |  |  |  |") for line in table)


def test_no_speed_beside_other_work(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(bench.speeds.psutil, "cpu_percent", lambda interval: 40.0)
    (tmp_path / bench.speeds.WIDE).mkdir()
    assert bench.speeds.measure(tmp_path, ("dense",), said.append) is None
    assert said == ["no speed: 40 % of the machine is busy with other work"]
