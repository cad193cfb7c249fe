"""The choice of a backend: what auto takes, what a forced one refuses, and with which words."""

import dataclasses
import importlib

import pytest
import torch

from pyprune import BackendError, InputError, backends, dispatch, ops

PROBLEM = backends.Problem("cpu", torch.float32, 1, 8, 12, 12, True, False, "silu")


@pytest.fixture
def compiled_triton(monkeypatch):
    """Triton as on a machine without its interpreter, whatever the environment of this run says."""
    kernels = importlib.import_module("pyprune.triton_kernels")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_INTERPRETED_TOO_LATE", False)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def test_table_of_backends_is_the_list_of_names():
    assert dispatch.names() == ["auto", *(b.NAME for b in backends.load_all().values())]
    assert {"torch", "triton"} <= set(dispatch.names())
    assert len(dispatch.names()) == len(backends.TABLE) + 1


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 4096])
def test_auto_takes_torch_on_the_cpu(gather, dtype, tokens):
    problem = dataclasses.replace(PROBLEM, gather=gather, dtype=dtype, tokens=tokens)
    assert dispatch.choose(problem).NAME == "torch"


def test_unknown_backend_names_the_nearest():
    with pytest.raises(InputError, match=r"backend must be one of auto, torch, triton; got 'troch' \(nearest: torch"):
        dispatch.choose(PROBLEM, "troch")


def test_forced_backend_is_used_or_refused_never_replaced(compiled_triton):
    assert dispatch.choose(PROBLEM, "torch").NAME == "torch"
    with pytest.raises(BackendError, match=r"no backend for Problem\(device='cpu'.*triton: needs a CUDA device"):
        dispatch.choose(PROBLEM, "triton")
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float64"):
        dispatch.choose(dataclasses.replace(PROBLEM, device="cuda", dtype=torch.float64), "triton")


def test_refusal_reaches_the_caller_of_the_operator(compiled_triton):
    with pytest.raises(BackendError, match="triton: needs a CUDA device"):
        ops.plain_ffn(torch.randn(2, 4), torch.randn(6, 8), activation="relu", backend="triton")


def test_triton_that_cannot_be_imported_is_a_reason(monkeypatch):
    triton = backends.load_all()["triton"]
    monkeypatch.setattr(triton, "_kernels", lambda: "Triton cannot be imported (No module named 'triton')")
    dispatch.choose.cache_clear()
    with pytest.raises(BackendError, match="triton: Triton cannot be imported"):
        dispatch.choose(PROBLEM, "triton")
    with pytest.raises(BackendError, match="Triton cannot be imported"):
        triton.run(None)
    assert dispatch.choose(PROBLEM).NAME == "torch"
    dispatch.choose.cache_clear()


def test_auto_gives_every_reason_when_nobody_can(monkeypatch):
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda problem: "is asleep")
    dispatch.choose.cache_clear()
    with pytest.raises(BackendError, match="torch: is asleep"):
        dispatch.choose(PROBLEM)
    with pytest.raises(BackendError, match=r"torch: is asleep; triton: is asleep"):
        dispatch.choose(dataclasses.replace(PROBLEM, device="cuda"))
    dispatch.choose.cache_clear()


@pytest.mark.parametrize(("gather", "first"), [(False, "torch"), (True, "triton")])
def test_auto_on_cuda(gather, first, monkeypatch):
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda problem: None)
    dispatch.choose.cache_clear()
    assert first == dispatch.choose(dataclasses.replace(PROBLEM, device="cuda", gather=gather)).NAME
    dispatch.choose.cache_clear()
