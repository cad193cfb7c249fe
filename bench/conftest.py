"""Options of the benches. Each takes a comma-separated list, or `all`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Plain `pytest` with importlib mode puts nothing on the path, and benches share `shapes`.
sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyprune benches")
    group.addoption("--shapes", default="", help="models of bench/shapes.py; default: a few small ones")
    group.addoption("--tokens", default="1,4,16,512", help="M: rows of x")
    group.addoption("--keeps", default="1.0,0.5", help="shares of neurons that stay")
    group.addoption("--forms", default="linear,compact,gather", help="linear, linear-compiled, compact, gather")
    group.addoption("--backends", default="all", help="backends of the PrunedMLP forms")
    group.addoption("--dtype", default="float32", help="float32, bfloat16 or float16")
    group.addoption("--device", default="", help="cpu or cuda; default: cuda where there is one")
    group.addoption("--seconds", type=float, default=0.5, help="time to spend on each FFN case")
    group.addoption("--model", default="demo", help="MODEL of the end-to-end bench")
    group.addoption("--compiled", action="store_true", help="end to end: torch.compile as well, the faster path counts")
    group.addoption("--repeats", type=int, default=5, help="end to end: recorded rounds")
