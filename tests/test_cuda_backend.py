"""The CUDA backend where there is no device: what it refuses, and how a configuration becomes a plan."""

import dataclasses

import pytest
import torch

from pyprune import InputError, backends, native
from pyprune.backends import Problem, cuda

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
