"""Lists of neurons whose length is a number on the device, on a GPU (`-m gpu`) or in Triton's interpreter."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyprune import triton_kernels as kernels
from pyprune.triton_kernels.launch import Launch

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = {"decode": kernels.ffn_decode, "prefill": kernels.ffn_prefill}
F, D, K = 90, 48, 70
# Rows far outside the record: used as one, they would be read from nowhere.
GARBAGE = 2**31 - 1


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the launchers allocate with NaN, so that a partial result that nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def problem(m: int, dtype: torch.dtype = torch.float32, *, gated: bool = True, int8: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    parts = 3 if gated else 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)

    p = {
        "x": normal(m, D),
        "record": normal(F, parts * D, scale=D**-0.5),
        "neuron_bias": normal(F, parts - 1, scale=0.5),
        "down_bias": normal(D),
        "residual": normal(m, D),
        "gated": gated,
        "activation": "silu",
    }
    if int8:
        p["record"] = torch.randint(-127, 128, (F, parts * D), generator=generator).to(torch.int8).to(DEVICE)
        p["scales"] = torch.rand((F, parts), generator=generator).to(DEVICE) * 0.003
    return p


def listed(count: int, seed: int = 0) -> Tensor:
    """`[K]`: `count` rows, then garbage."""
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    garbage = torch.full((K - count,), GARBAGE) * torch.tensor([1, -1]).repeat(K)[: K - count]
    return torch.cat([order, garbage]).int().to(DEVICE)


def on_device(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 64, K])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_list_for_the_batch(path: str, count: int, dtype: torch.dtype) -> None:
    # The blocks of a configuration follow K: the same list in a tensor of its own length may be split otherwise.
    p = problem(5, dtype)
    index = listed(count)
    out = PATHS[path](**p, index=index, count=on_device(count))
    assert out.isfinite().all()
    wanted = PATHS[path](**p, index=index[:count].contiguous())
    assert (out.double() - wanted.double()).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max().double()
    if count == K:
        assert torch.equal(out, PATHS[path](**p, index=index))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["plain", "gated", "int8"])
@pytest.mark.parametrize("m", [1, 9, 33])
def test_every_form(path: str, form: str, m: int) -> None:
    p = problem(m, torch.float16, gated=form != "plain", int8=form == "int8")
    index = listed(41)
    out, wanted = (
        PATHS[path](**p, index=index, count=on_device(41)),
        PATHS[path](**p, index=index[:41].contiguous()),
    )
    assert (out.double() - wanted.double()).abs().max() <= 2e-3 * wanted.abs().max().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_list_for_every_token_is_each_token_alone(dtype: torch.dtype, int8: bool) -> None:
    p = problem(4, dtype, int8=int8)
    counts = (K, 0, 1, 37)
    index = torch.stack([listed(count, seed) for seed, count in enumerate(counts)])
    together = kernels.ffn(**p, index=index, count=on_device(*counts))
    for token, count in enumerate(counts):
        alone = {**p, "x": p["x"][token : token + 1], "residual": p["residual"][token : token + 1]}
        out = kernels.ffn(**alone, index=index[token], count=on_device(count))
        assert torch.equal(together[token], out[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [-1, -(2**31), K + 1, 2**31 - 1])
def test_a_count_out_of_range_reads_nothing_outside(path: str, count: int) -> None:
    p = problem(3)
    held = K if count > 0 else 0
    index = listed(held)
    out = PATHS[path](**p, index=index, count=on_device(count))
    assert torch.equal(out, PATHS[path](**p, index=index, count=on_device(held)))


@pytest.mark.parametrize("path", PATHS)
def test_neurons_outside_the_list_are_never_read(path: str) -> None:
    p = problem(3, torch.bfloat16)
    index = listed(20)
    clean = PATHS[path](**p, index=index, count=on_device(20))
    rest = torch.ones(F, dtype=torch.bool, device=DEVICE)
    rest[index[:20].long()] = False
    p["record"][rest], p["neuron_bias"][rest] = float("nan"), float("nan")
    assert torch.equal(PATHS[path](**p, index=index, count=on_device(20)), clean)


def test_the_host_never_looks_at_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(2)
    launched = []
    monkeypatch.setattr(Launch, "run", lambda self: launched.append((self.kernel.__name__, self.grid)))
    grids = []
    for count in (0, K):
        launched.clear()
        kernels.ffn(**p, index=listed(count), count=on_device(count))
        grids.append(list(launched))
    assert grids[0] == grids[1]
    assert [name for name, _ in grids[0]] == ["slab_kernel", "reduce_kernel"]


def test_bad_lists_are_named_with_rule_and_value() -> None:
    p, index = problem(3), listed(5)
    own = torch.stack([index] * 3)
    matrix = kernels.prefill_config(3, K, D, torch.float32, True, True, True)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"count": on_device(1)}, "count must be None without an index"),
        ({"index": index, "count": on_device(1, 2)}, "count must have shape (1,); got (2,)"),
        ({"index": index, "count": on_device(1).long()}, "count must be torch.int32; got torch.int64"),
        ({"index": own}, f"index must have shape [K]; got (3, {K})"),
        ({"index": own[:2], "count": on_device(1, 2)}, f"index must have a row for each of 3 tokens; got (2, {K})"),
        ({"index": own, "count": on_device(1)}, "count must have shape (3,); got (1,)"),
        ({"index": own, "count": on_device(1, 2, 3), "config": matrix}, "config must be of kind decode where"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.ffn(**{**p, **change})
    with pytest.raises(ValueError, match="config must be of kind decode where"):
        kernels.ffn_prefill(**p, index=own, count=on_device(1, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_a_graph_follows_lists_and_counts_that_change(own: bool) -> None:
    p = problem(3, torch.bfloat16)
    index, count = listed(10), on_device(10)
    if own:
        index, count = torch.stack([index] * 3), count.repeat(3)
    kernels.ffn(**p, index=index, count=count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.ffn(**p, index=index, count=count)
    for kept in (0, 1, 33, K):
        index.copy_(listed(kept, seed=kept).expand_as(index))
        count.fill_(kept)
        graph.replay()
        assert torch.equal(out, kernels.ffn(**p, index=index, count=count))
