"""The documented recipe, a static cache and torch.compile of single steps, gives the tokens of `generate`."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import InputError, accelerate
from pyprune.model import surgery
from pyprune.model.families import find_ffns

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when the script is run
    return importlib.import_module("bench.model.compiled")


# What Inductor makes of a step takes long to compile; what is traced, and when, is the same without it.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "weights"), [("llama", None), ("llama", "int4"), ("gpt2", "int8")])
def test_tokens_are_those_of_generate(
    name: str,
    weights: str | None,
    backend: str,
    bench: ModuleType,
    tiny: Callable[..., Any],
    ids: Tensor,
    random_mask: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name)
    for ffn, keep in zip(find_ffns(model), random_mask(model, (60, 33, 96)).layers, strict=True):
        surgery.cut(ffn, keep)
    accelerate(model, weights=weights)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = model.generate(ids[:1], **options)
        steps: list[int] = []
        compile_it = functools.partial(torch.compile, backend=backend)

        def count(run: Callable[..., Any], **given: Any) -> Callable[..., Any]:
            made = compile_it(run, fullgraph=True, **given)
            return lambda *args, **more: steps.append(1) or made(*args, **more)

        monkeypatch.setattr(torch, "compile", count)
        bench.compiled(model)
        got = model.generate(ids[:1], cache_implementation="static", **options)
    assert torch.equal(got, want)
    assert len(steps) == 9, "every token but the first, which the prompt gives"
    del model.forward
    assert torch.equal(model.generate(ids[:1], **options), want)


def test_the_bench_measures_and_compares(
    bench: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = {"model": str(tiny_checkpoint), "dtype": "float32", "keep": 0.5, "new_tokens": 6, "repeats": 1}
    bench.main(**options, weights="float32,int4", out_file=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [r["what"] for r in rows] == ["dense", "float32", "float32, compiled", "int4", "int4, compiled"]
    assert all(r["same"] == 1 and r["tokens_per_s"] > 0 for r in rows)
    with pytest.raises(InputError, match="weights must be one of"):
        bench.main(**options, weights="int5", out_file=None)
    with pytest.raises(InputError, match="new_tokens must be at least 4"):
        bench.main(**{**options, "new_tokens": 3}, weights="int4", out_file=None)
