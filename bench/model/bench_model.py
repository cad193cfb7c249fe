"""End to end: decode, prefill and FFN speed of a real model, dense and in each pruned form, by `benchmark`.

    pytest bench/model/bench_model.py --benchmark-only --keeps 0.5

Speed does not depend on which neurons go, so random ones do. The whole report is in `extra_info`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pyprune import accelerate, prune
from pyprune.model.loading import load_model
from pyprune.speed.benchmark import benchmark as measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "keep" in metafunc.fixturenames:
        keeps = [float(k) for k in metafunc.config.getoption("--keeps").split(",")]
        metafunc.parametrize("keep", [k for k in keeps if k < 1])


def test_model(benchmark: Any, keep: float, request: pytest.FixtureRequest) -> None:
    """Time one model at one keep."""
    option = request.config.getoption
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    dense = load_model(option("--model"), option("--dtype"), device)
    narrow, compact, gather = (copy.deepcopy(dense) for _ in range(3))
    mask = prune(narrow, keep, "random", repair=None).mask
    candidates = {
        "narrow modules": narrow,
        "PrunedMLP compact": accelerate(compact, mask=mask),
        "PrunedMLP gather": accelerate(gather, mode="gather", mask=mask),
    }
    report = benchmark.pedantic(
        measure,
        (dense, candidates),
        {"compiled": option("--compiled"), "repeats": option("--repeats")},
        rounds=1,
        iterations=1,
    )
    benchmark.extra_info["model"] = option("--model")
    benchmark.extra_info["report"] = report.to_json()
