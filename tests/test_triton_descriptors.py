"""The matrix products with tensor descriptors, on a GPU (`-m gpu`) or in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyprune import triton_kernels as kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
OLD = not kernels.INTERPRETED and torch.cuda.get_device_capability() < (9, 0)
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
pytestmark += [pytest.mark.skipif(OLD, reason="needs compute capability 9.0")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the launchers allocate with NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def problem(m: int, f: int, d: int, dtype: torch.dtype, gated: bool = True, extras: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    parts = 3 if gated else 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)

    return {
        "x": normal(m, d),
        "record": normal(f, parts * d, scale=d**-0.5),
        "neuron_bias": normal(f, parts - 1, scale=0.5) if extras else None,
        "down_bias": normal(d) if extras else None,
        "gated": gated,
        "activation": "silu",
    }


def config(p: dict[str, Any], dtype: torch.dtype) -> kernels.PrefillConfig:
    (m, d), f = p["x"].shape, p["record"].shape[0]
    made = kernels.prefill_config(m, f, d, dtype, p["gated"], False, True)
    assert isinstance(made, kernels.PrefillConfig)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("m", "f", "d", "splits", "extras"),
    [(1, 1, 16, 1, False), (9, 300, 48, 3, True), (65, 127, 64, 1, True), (130, 588, 80, 2, False)],
)
def test_descriptors_give_what_pointers_give(
    dtype: torch.dtype, gated: bool, m: int, f: int, d: int, splits: int, extras: bool
) -> None:
    p = problem(m, f, d, dtype, gated, extras)
    pointers = replace(config(p, dtype), splits=splits)
    described = replace(pointers, descriptors=True)
    assert torch.equal(kernels.ffn(**p, config=described), kernels.ffn(**p, config=pointers))


def test_tokens_no_descriptor_can_step_along_are_copied() -> None:
    p = problem(5, 70, 48, torch.float16)
    described = replace(config(p, torch.float16), descriptors=True)
    odd = torch.zeros(5, 51, dtype=torch.float16, device=DEVICE)
    odd[:, 3:] = p["x"]
    assert torch.equal(kernels.ffn(**{**p, "x": odd[:, 3:]}, config=described), kernels.ffn(**p, config=described))


def test_a_record_that_is_a_prefix_or_padded() -> None:
    p = problem(20, 70, 48, torch.float16)
    described = replace(config(p, torch.float16), descriptors=True)
    clean = kernels.ffn(**p, config=described)
    wide = torch.full((90, 160), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:70, :144] = p["record"]
    assert torch.equal(kernels.ffn(**{**p, "record": wide[:70, :144]}, config=described), clean)


def test_what_descriptors_cannot_describe_is_refused() -> None:
    p = problem(5, 70, 48, torch.float16)
    described = replace(config(p, torch.float16), descriptors=True)
    index = torch.arange(7, dtype=torch.int32, device=DEVICE)
    int8 = {"record": p["record"].to(torch.int8), "scales": torch.ones(70, 3, device=DEVICE)}
    for change, reason in (
        ({"index": index}, "descriptors describe compact records, and this call has an index; got True"),
        (int8, "this record is int8"),
        (problem(5, 70, 40, torch.float16), "descriptors need record parts on 16-byte boundaries"),
    ):
        with pytest.raises(ValueError, match=f"config must have descriptors false: .*{reason}"):
            kernels.ffn(**{**p, **change}, config=described)


@pytest.mark.gpu
def test_a_graph_replays_descriptors() -> None:
    p = problem(300, 1024, 512, torch.bfloat16)
    described = replace(config(p, torch.bfloat16), descriptors=True)
    wanted = kernels.ffn(**p, config=described)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.ffn(**p, config=described)
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 512])
def test_two_runs_with_descriptors_give_the_same_bits(m: int) -> None:
    p = problem(m, 1100, 512, torch.bfloat16)
    described = replace(config(p, torch.bfloat16), descriptors=True)
    assert torch.equal(kernels.ffn(**p, config=described), kernels.ffn(**p, config=described))
