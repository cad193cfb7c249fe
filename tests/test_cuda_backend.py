"""The CUDA backend where there is no device: what it refuses, and how a configuration becomes a plan."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune import InputError
from pyprune.ffn import backends, native
from pyprune.ffn.backends import Problem, cuda

BENCH = Path(__file__).parent.parent / "bench"
PROBLEM = Problem("cuda", torch.bfloat16, 1, 4096, 14336, 14336, True, False, "silu")


def test_a_configuration_becomes_the_numbers_of_a_plan() -> None:
    unset = cuda.plan(None)
    assert unset == cuda.plan({}) == [-1, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1]
    given = {"algorithm": "two_pass", "splits": 16, "overlap": True, "evict_first": False}
    assert cuda.plan(given) == [1, 0, 0, 0, 0, 0, 16, 0, 1, -1, -1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": 3}, "config must be one of .*stages.*; got 'stage'"),
        ({"algorithm": "best"}, r"config\['algorithm'\] must be one of single_pass, two_pass; got 'best'"),
        ({"splits": "many"}, r"config\['splits'\] must be an integer or a boolean; got 'many'"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cuda.plan(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "needs tensors on a CUDA device, not on cpu"),
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"weights": torch.float64}, "no kernel for torch.float64 weights"),
        ({"hidden_size": 1 << 18}, "no kernel for a hidden_size above 131072"),
    ],
)
def test_what_there_is_no_kernel_for(changes: dict, reason: str) -> None:
    assert cuda.why_not(dataclasses.replace(PROBLEM, **changes)) == reason


def test_without_library_or_device_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_cuda", lambda: "native CUDA library not built: no nvcc")
    assert cuda.why_not(PROBLEM) == "native CUDA library not built: no nvcc"
    monkeypatch.setattr(native, "load_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_not(PROBLEM) == "needs a CUDA device; torch sees none"
    assert backends.load_all()["cuda"] is cuda


# --- what is worth a try, planned by the simulator


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench's planner, within which the backend plans for an H100."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    found = importlib.import_module("bench.gpu.plans")
    if found.simulator() is None:
        pytest.skip("the simulator of the CUDA kernels is not built")
    with found.planned_for():
        yield found


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(("model", "f", "gated"), [("llama-3-8b", 14336, True), ("opt-6.7b", 16384, False)])
def test_no_two_candidates_are_planned_alike(plans: Any, model: str, f: int, gated: bool, keep: float, gather: bool):
    kept = int(f * keep)
    wanted = Problem("cuda", torch.bfloat16, 1, 4096, f if gather else kept, kept, gated, gather, "silu")
    found = plans.plans(wanted)
    assert len({json.dumps(entry["plan"]) for entry in found}) == len(found) >= 12
    assert found[0]["config"] == cuda.default_config(wanted)
    base = found[0]["plan"]
    changes = [{k: v for k, v in entry["plan"].items() if base.get(k) != v} for entry in found]
    assert changes[1] == {"overlap": 1}, "the first thing to try"
    assert {c["algorithm"] for c in changes if "algorithm" in c} == {1}, "two passes are among them"


def test_candidates_where_the_default_is_another(plans: Any) -> None:
    """More tokens than the single pass has registers for; sums that no row changes; an A100, which has no clusters."""
    many = cuda.candidate_configs(dataclasses.replace(PROBLEM, tokens=8))
    assert {c["algorithm"] for c in many} == {"two_pass"} and len(many) >= 5
    assert cuda.candidate_configs(dataclasses.replace(PROBLEM, tokens=16))
    assert cuda.candidate_configs(dataclasses.replace(PROBLEM, tokens=17)) == [], "each would read the weights 3 times"
    invariant = cuda.candidate_configs(dataclasses.replace(PROBLEM, batch_invariant=True))
    assert [c["splits"] for c in invariant] == [17, 4, 8, 16, 32]
    with plans.planned_for((108, 163 * 1024, 0, 0)):
        found = cuda.candidate_configs(PROBLEM)
    assert found[0]["algorithm"] == "two_pass" and any(c["algorithm"] == "single_pass" for c in found)
    assert not any(c.get("overlap") or c.get("cluster", 1) > 1 for c in found)
