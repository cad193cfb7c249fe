"""The choice of a backend: what auto takes, what a forced one refuses, and with which words."""

import dataclasses
import importlib

import pytest
import torch

from pyprune import BackendError, InputError
from pyprune.base.record import Record
from pyprune.ffn import backends, dispatch, native, ops, scratch

PROBLEM = backends.Problem("cpu", torch.float32, 1, 8, 12, 12, True, False, "silu")


def forget():
    for cached in (dispatch.choose, dispatch.native_tokens):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh_choices():
    """Choices are cached, and these tests change what they are made from."""
    forget()
    yield
    forget()


@pytest.fixture
def native_library(monkeypatch):
    """`native_library(reason)`: the native library as loaded (None), or as missing for `reason`."""

    def pretend(reason):
        monkeypatch.setattr(native, "load", lambda: reason)
        forget()

    return pretend


@pytest.fixture
def compiled_triton(monkeypatch):
    """Triton as on a machine without its interpreter, whatever the environment of this run says."""
    checks = importlib.import_module("pyprune.triton_kernels.checks")
    monkeypatch.setattr(checks, "INTERPRETED", False)
    monkeypatch.setattr(checks, "_INTERPRETED_TOO_LATE", False)


def test_table_of_backends_is_the_list_of_names():
    assert dispatch.names() == ["auto", *(b.NAME for b in backends.load_all().values())]
    assert {"torch", "cpu", "triton", "cuda", "cublas"} <= set(dispatch.names())
    assert len(dispatch.names()) == len(backends.TABLE) + 1


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 4096])
def test_auto_takes_torch_on_a_cpu_without_the_native_library(gather, dtype, tokens, native_library):
    native_library("native CPU library not built")
    problem = dataclasses.replace(PROBLEM, gather=gather, dtype=dtype, tokens=tokens)
    assert dispatch.choose(problem).backend.NAME == "torch"


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", [*FLOATS, torch.int8])
def test_auto_on_a_cpu_takes_the_native_kernel_for_few_tokens(gather, dtype, weights, native_library, monkeypatch):
    native_library(None)
    monkeypatch.setattr(dispatch.reference, "multiplies_half", lambda: True)
    monkeypatch.setitem(dispatch._NATIVE_TOKENS, (weights, gather), (3, 2))
    problem = dataclasses.replace(PROBLEM, gather=gather, dtype=dtype, weights=weights)
    chosen = [dispatch.choose(dataclasses.replace(problem, tokens=m)).backend.NAME for m in (0, 1, 3, 4)]
    assert chosen == ["cpu", "cpu", "cpu", "torch"]
    assert dispatch.native_tokens(dtype, weights, 1024, gather) == 3
    assert dispatch.native_tokens(dtype, weights, 1025, gather) == 2
    assert dispatch.choose(dataclasses.replace(problem, tokens=4), "cpu").backend.NAME == "cpu"


@pytest.mark.parametrize(("dtype", "weights"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float16)])
def test_float16_is_native_at_any_length_where_torch_multiplies_it_by_loops(
    dtype, weights, native_library, monkeypatch
):
    native_library(None)
    monkeypatch.setattr(dispatch.reference, "multiplies_half", lambda: False)
    problem = dataclasses.replace(PROBLEM, dtype=dtype, weights=weights, tokens=10**6)
    chosen = dispatch.choose(problem).backend.NAME
    assert chosen == ("cpu" if dtype == weights else "torch")


def test_auto_on_a_cpu_asks_the_other_one_too(native_library, monkeypatch):
    native_library(None)
    monkeypatch.setattr(dispatch.backends()["torch"], "why_not", lambda problem: "is asleep")
    assert dispatch.choose(dataclasses.replace(PROBLEM, tokens=10**6)).backend.NAME == "cpu"


@pytest.mark.parametrize("in_use", ["avx2", "amx"])
def test_only_matrix_tiles_take_many_bfloat16_tokens(in_use, native_library, monkeypatch):
    native_library(None)
    monkeypatch.setattr(dispatch.native, "isa", lambda: in_use)
    dispatch.native_tokens.cache_clear()
    limits = [dispatch.native_tokens(x, torch.bfloat16, 64, False) for x in (torch.bfloat16, torch.float32)]
    dispatch.native_tokens.cache_clear()
    assert limits == [dispatch._NATIVE_TOKENS[torch.bfloat16, False][0] if in_use == "amx" else 64, 64]


def test_native_tokens_are_none_where_the_kernel_cannot_run(native_library):
    native_library(None)
    assert dispatch.native_tokens(torch.float64, torch.float64, 64, False) == 0
    assert dispatch.native_tokens(torch.float64, torch.int8, 64, False) == 0
    native_library("native CPU library not built")
    assert dispatch.native_tokens(torch.float32, torch.float32, 64, False) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "needs tensors on a CPU, not on cuda"),
        ({"dtype": torch.float64}, r"no kernel for torch\.float64"),
        ({"weights": torch.float64}, r"no kernel for torch\.float64 weights"),
        ({}, "native CPU library not built"),
    ],
)
def test_forced_native_kernel_says_why_not(changes, reason, native_library):
    native_library("native CPU library not built" if not changes else None)
    with pytest.raises(BackendError, match=f"no backend for Problem.*: cpu: {reason}$"):
        dispatch.choose(dataclasses.replace(PROBLEM, **changes), "cpu")


def test_triton_refuses_weights_of_another_dtype(compiled_triton):
    problem = dataclasses.replace(PROBLEM, device="cuda", tokens=1024, weights=torch.float16)
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float16 weights beside x of torch\.float32"):
        dispatch.choose(problem, "triton")
    for gather in (False, True):
        assert dispatch.choose(dataclasses.replace(problem, gather=gather)).backend.NAME == "torch"


def test_unknown_backend_names_the_nearest():
    with pytest.raises(
        InputError, match=r"backend must be one of auto, torch, cpu, triton, cuda, cublas; got 'troch' \(nearest: torch"
    ):
        dispatch.choose(PROBLEM, "troch")


def test_forced_backend_is_used_or_refused_never_replaced(compiled_triton):
    assert dispatch.choose(PROBLEM, "torch").backend.NAME == "torch"
    with pytest.raises(BackendError, match=r"no backend for Problem\(device='cpu'.*triton: needs a CUDA device"):
        dispatch.choose(PROBLEM, "triton")
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float64"):
        dispatch.choose(dataclasses.replace(PROBLEM, device="cuda", dtype=torch.float64), "triton")


def test_refusal_reaches_the_caller_of_the_operator(compiled_triton):
    with pytest.raises(BackendError, match="triton: needs a CUDA device"):
        ops.ffn(torch.randn(2, 4), Record(torch.randn(6, 8), False, "relu"), backend="triton")


def test_triton_that_cannot_be_imported_is_a_reason(monkeypatch):
    triton = backends.load_all()["triton"]
    monkeypatch.setattr(triton, "_kernels", lambda: "Triton cannot be imported (No module named 'triton')")
    with pytest.raises(BackendError, match="triton: Triton cannot be imported"):
        dispatch.choose(PROBLEM, "triton")
    with pytest.raises(BackendError, match="Triton cannot be imported"):
        triton.run(None, None)
    assert dispatch.choose(dataclasses.replace(PROBLEM, device="cuda", gather=True, tokens=9)).backend.NAME == "cublas"


def test_auto_gives_every_reason_when_nobody_can(monkeypatch):
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda problem: "is asleep")
    with pytest.raises(BackendError, match="torch: is asleep; cpu: is asleep"):
        dispatch.choose(PROBLEM)
    everyone = "cuda: is asleep; triton: is asleep; cublas: is asleep; torch: is asleep"
    with pytest.raises(BackendError, match=everyone):
        dispatch.choose(dataclasses.replace(PROBLEM, device="cuda"))


# LLaMA-3-8B's, at half its width.
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "kept": 7168, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("form", "tokens", "order"),
    [
        ({}, 1, "cuda triton cublas torch"),
        ({}, 2, "cublas triton cuda torch"),
        ({}, 8, "cublas triton cuda torch"),
        ({}, 9, "cublas triton torch"),
        ({"gather": True}, 4, "cublas triton cuda torch"),
        ({"weights": torch.int8}, 4, "cuda triton cublas torch"),
        ({**LARGE, "gather": True}, 512, "cublas triton torch"),
        ({"batch_invariant": True}, 4096, "triton cuda torch"),
    ],
)
def test_order_of_auto_on_cuda(form, tokens, order, monkeypatch):
    monkeypatch.setattr(scratch, "_room", lambda device: 17 << 30)
    problem = dataclasses.replace(PROBLEM, device="cuda", tokens=tokens, **form)
    asleep = set()
    for name, backend in dispatch.backends().items():
        monkeypatch.setattr(backend, "why_not", lambda _, name=name: "is asleep" if name in asleep else None)
    for name in order.split():
        chosen = dispatch.choose(problem)
        assert (chosen.backend.NAME, chosen.config, chosen.source) == (name, None, "predicted")
        asleep.add(name)
        dispatch.choose.cache_clear()


@pytest.mark.parametrize("tokens", [16, 512, 4096])
def test_a_gather_whose_rows_cannot_be_kept_copies_them_for_many_tokens_only(tokens, monkeypatch):
    gather = dataclasses.replace(PROBLEM, device="cuda", tokens=tokens, **{**LARGE, "gather": True})
    rows = 7168 * 3 * 4096 * 2
    monkeypatch.setattr(scratch, "_room", lambda device: 32 * rows)
    assert dispatch._order(gather)[0] == "cublas"
    monkeypatch.setattr(scratch, "_room", lambda device: 32 * rows - 1)
    assert dispatch._order(gather)[0] == ("triton" if tokens == 16 else "cublas")


def test_what_was_measured_comes_before_what_is_predicted(monkeypatch):
    problem = dataclasses.replace(PROBLEM, device="cuda", tokens=512, **LARGE)
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda problem: None)
    assert dispatch.choose(problem).backend.NAME == "cublas"
    slow = dispatch.tuned.Entry("triton", dict(dispatch.backends()["triton"].default_config(problem)), 1.0)
    monkeypatch.setattr(dispatch.tuned, "find", lambda problem: [slow])
    forget()
    chosen = dispatch.choose(problem)
    assert (chosen.backend.NAME, chosen.config, chosen.source) == ("triton", slow.config, "tuned")
