"""Configurations of the Triton kernels: as JSON, as candidates, batch-invariant, and through the backend."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyprune import triton_kernels as kernels
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn.backends import Problem
from pyprune.ffn.backends import triton as backend
from pyprune.ffn.quantisation import widened

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
DECODE = kernels.decode_config(1, 4096, 4096, torch.bfloat16, True, True)
PREFILL = kernels.prefill_config(512, 4096, 4096, torch.bfloat16, True, False, True)


def operands(m: int, dtype: torch.dtype = torch.float32, f: int = 100, d: int = 48) -> tuple[Tensor, Record]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, d, 1.0), (f, 3 * d, d**-0.5), (f, 2, 0.5), (1, d, 1.0))
    x, *made = [(torch.randn(a, b, generator=generator) * s).to(dtype).to(DEVICE) for a, b, s in shapes]
    return x, Record(made[0], True, "silu", neuron_bias=made[1], down_bias=made[2][0])


def problem(m: int, k: int = 100, d: int = 48, dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    return Problem(DEVICE, dtype, m, d, k, k, True, options.pop("gather", False), "silu", **options)


@pytest.mark.parametrize("config", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_json_and_back(config: kernels.Config) -> None:
    flat = json.loads(json.dumps(kernels.to_json(config)))
    assert kernels.from_json(flat) == config
    assert all(isinstance(value, int | str | bool) for value in flat.values())


BAD = {
    "no_kind": ({"kind": None}, r"config\['kind'\] must be one of decode, prefill; got None"),
    "kind": ({"kind": "fast"}, r"config\['kind'\] must be one of decode, prefill; got 'fast'"),
    "unknown": ({"speed": 11}, r"config must not hold the key 'speed'; got block_d, "),
    "missing": ({"slab": ...}, r"config must hold the key 'slab'; got block_d, "),
    "text": ({"slab": "64"}, r"config\['slab'\] must be a positive integer; got '64'"),
    "flag": ({"num_stages": True}, r"config\['num_stages'\] must be a positive integer; got True"),
    "zero": ({"num_stages": 0}, r"config\['num_stages'\] must be a positive integer; got 0"),
    "odd": ({"slab": 48}, r"config\['slab'\] must be a power of two, at least 16; got 48"),
    "small": ({"block_d": 8}, r"config\['block_d'\] must be a power of two, at least 16; got 8"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_json_is_refused_by_key(name: str) -> None:
    change, message = BAD[name]
    values = {key: value for key, value in {**kernels.to_json(DECODE), **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        kernels.from_json(values)


def test_a_flag_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"config\['descriptors'\] must be true or false; got 1"):
        kernels.from_json({**kernels.to_json(PREFILL), "descriptors": 1})


@pytest.mark.parametrize("m", [1, 7, 16, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_computes_the_same(m: int, dtype: torch.dtype) -> None:
    x, record = operands(m, dtype)
    configs = backend.candidate_configs(problem(m, dtype=dtype))
    assert configs[0] == backend.default_config(problem(m, dtype=dtype))
    truth = reference.ffn(x.double(), widened(record))
    allowed = 4 * torch.finfo(dtype).eps * truth.abs().max()
    for config in (None, *configs):
        out = backend.run(x, record, json.loads(json.dumps(config)))
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= allowed, config


def test_candidates_are_few_distinct_and_valid() -> None:
    sizes = itertools.product((1, 4, 12, 16, 40, 64, 100, 4096), (16, 768, 3072, 14336), (48, 768, 4096, 4097))
    for (m, k, d), gather, dtype in itertools.product(sizes, (False, True), (torch.float32, torch.float16)):
        for weights in (None, torch.int8):
            found = backend.candidate_configs(problem(m, k, d, dtype, gather=gather, weights=weights))
            assert 1 <= len(found) <= 12
            assert len({json.dumps(config) for config in found}) == len(found)
            assert [kernels.to_json(kernels.from_json(config)) for config in found] == found
            assert found[0] == backend.default_config(problem(m, k, d, dtype, gather=gather, weights=weights))


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """As matrix units do; numpy's, which the interpreter takes, orders its sums by the shapes."""
    a, b = a.astype(dtype or np.float32), b.astype(dtype or np.float32)
    total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for i in range(a.shape[1]):
        total += a[:, i, None] * b[i]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_batch_invariance_from_one_token_to_many(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "matmul", product_in_order)
    x, record = operands(150, dtype)
    out = backend.run(x, record, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 12), slice(64, 97), slice(20, 90)):
        part = x[rows]
        assert torch.equal(backend.run(part, record, batch_invariant=True), out[rows])
        config = backend.default_config(problem(len(part), dtype=dtype, batch_invariant=True))
        assert config["kind"] == "prefill"
    assert len(backend.candidate_configs(problem(5, batch_invariant=True))) == 1


def test_the_backend_says_what_it_cannot_run() -> None:
    assert backend.why_not(problem(1)) is None
    assert backend.why_not(problem(1, weights=torch.int8)) is None
    assert "no kernel for torch.float64" in str(backend.why_not(problem(1, dtype=torch.float64)))
    assert "weights beside x" in str(backend.why_not(problem(1, weights=torch.float16)))
    with pytest.raises(ValueError, match="config must hold the key"):
        backend.run(*operands(1), {"kind": "decode"})


def test_an_index_and_int8_reach_the_kernels() -> None:
    x, record = operands(3)
    index = torch.arange(0, 100, 2, dtype=torch.int32, device=DEVICE)
    small, scales = (record.rows * 20).round().to(torch.int8), torch.full((100, 3), 0.05, device=DEVICE)
    given = dataclasses.replace(record, rows=small, scales=scales, index=index)
    assert torch.allclose(backend.run(x, given), reference.ffn(x, given), atol=1e-5)
