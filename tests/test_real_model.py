"""SmolLM2-135M-Instruct, for real: compensation helps, stock Transformers reads the result, memory stays small."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import prune
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli import demo
from pyprune.evaluation import perplexity
from pyprune.model import checkpoint, families, loading


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return loading.load_tokenizer("demo")


@pytest.fixture(scope="module")
def dense() -> Any:
    return loading.load_model("demo")


def windows(tokenizer: Any, part: str, tokens: int, window: int) -> Tensor:
    return token_windows(tokenizer, load_text(None, part)[0], tokens, window)


def pruned(dense: Any, compensate: str, batches: Tensor, keep: float = 0.7) -> tuple[Any, Any]:
    model = copy.deepcopy(dense)
    return model, prune(model, keep=keep, method="wanda", repair=compensate, text=batches)


def test_prune_save_reload(dense: Any, tokenizer: Any, tmp_path: Path) -> None:
    batches, held_out = windows(tokenizer, "first", 1280, 256), windows(tokenizer, "second", 512, 256)
    model, report = pruned(dense, "least-squares", batches)
    assert set(report.mask.widths) == {1088}
    assert report.parameters_before - report.parameters_after == 30 * 3 * 576 * (1536 - 1088)
    assert all(e.error_repaired < e.error_cut for e in report.layers)
    checkpoint.save(model, tmp_path / "x", tokenizer)
    assert demo._reload(tmp_path / "x", model, held_out[:1])["difference"] == 0
    found = perplexity(model, held_out).perplexity
    blind = copy.deepcopy(dense)
    prune(blind, method="random", repair=None)
    assert 1 < found < perplexity(blind, held_out).perplexity / 2


def test_the_fingerprint_does_not_depend_on_the_dtype(dense: Any) -> None:
    models = dense, copy.deepcopy(dense).to(torch.bfloat16)
    prints = [families.fingerprint(model, families.find_ffns(model)) for model in models]
    assert prints[0] == prints[1]


@pytest.mark.slow
def test_least_squares_pays_and_memory_stays_near_the_model(dense: Any, tokenizer: Any) -> None:
    batches, held_out = windows(tokenizer, "first", 16384, 1024), windows(tokenizer, "second", 8192, 1024)
    found = {}
    for compensate in ("none", "least-squares"):
        model, report = pruned(dense, compensate, batches)
        assert report.bytes_before + report.peak_bytes <= 1.6 * report.bytes_before
        found[compensate] = perplexity(model, held_out).perplexity
    assert found["least-squares"] <= 0.9 * found["none"]
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
