"""int8 records in the Triton kernels against float64, on a GPU (`-m gpu`) or in Triton's interpreter."""

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

from triton_cases import PATHS, twin

from pyprune import triton_kernels as kernels
from pyprune.ffn import quantisation
from pyprune.triton_kernels import checks

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(
    m: int, f: int, d: int, dtype: torch.dtype, gated: bool, activation: str, *, extras: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `ffn` with an int8 record; every part of every neuron has another scale."""
    generator = torch.Generator().manual_seed(seed)
    parts = 3 if gated else 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    sizes = torch.exp(torch.randn((f, parts, 1), generator=generator))
    weights = torch.randn((f, parts, d), generator=generator) * d**-0.5 * sizes
    record, scales = quantisation.quantise(weights.flatten(1), parts)
    p: dict[str, Any] = {
        "x": normal(m, d),
        "record": record,
        "scales": scales,
        "neuron_bias": normal(f, parts - 1, scale=0.5) if extras else None,
        "down_bias": normal(d) if extras else None,
    }
    here = {name: value if value is None else value.to(DEVICE) for name, value in p.items()}
    return {**here, "gated": gated, "activation": activation}


def check(out: Tensor, p: dict[str, Any]) -> None:
    """Largest and mean square error: at most twice torch's own, or a unit in the last place of the output."""
    dtype = p["x"].dtype
    assert out.shape == p["x"].shape
    assert out.dtype == dtype
    truth = twin(p, torch.float64)
    error, own = (out.double() - truth).abs(), (twin(p, dtype).double() - truth).abs()
    floor = truth.abs().max() * torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert error.max() <= max(2 * own.max(), floor), (error.max(), own.max(), floor)
    rms, own_rms = error.square().mean().sqrt(), own.square().mean().sqrt()
    assert rms <= max(2 * own_rms, floor / 2), (rms, own_rms)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("m", "f", "d"), [(1, 1, 1), (1, 65, 63), (3, 130, 64), (17, 127, 65), (70, 40, 33)])
def test_every_form_and_odd_sizes(path: str, dtype: torch.dtype, gated: bool, m: int, f: int, d: int) -> None:
    p = problem(m, f, d, dtype, gated, "silu" if gated else "gelu")
    check(PATHS[path](**p), p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "biases"])
def test_every_activation(path: str, activation: str, extras: bool) -> None:
    for gated in (False, True):
        p = problem(5, 70, 48, torch.bfloat16, gated, activation, extras=extras, seed=1)
        check(PATHS[path](**p), p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_reads_no_other_row_or_scale(path: str, dtype: torch.dtype) -> None:
    p = problem(4, 60, 48, dtype, True, "silu", seed=2)
    kept = torch.arange(0, 60, 3, dtype=torch.int32, device=DEVICE)
    p["index"] = kept
    rest = torch.ones(60, dtype=torch.bool, device=DEVICE)
    rest[kept.long()] = False
    clean = PATHS[path](**p)
    check(clean, p)
    p["scales"][rest], p["neuron_bias"][rest] = float("nan"), float("nan")
    p["record"][rest] = -128
    assert torch.equal(PATHS[path](**p), clean)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [2.0**-9, 1.0, 2.0**7])
def test_float16_holds_activations_times_small_scales_and_large(path: str, size: float) -> None:
    # Scales are about size / 2000: alone, times an activation, they would leave the range of float16 on either side.
    p = problem(3, 200, 64, torch.float16, False, "relu2", extras=False, seed=3)
    p["scales"][:, 1] *= size
    check(PATHS[path](**p), p)


@pytest.mark.parametrize("path", PATHS)
def test_strided_scales_and_padded_rows(path: str) -> None:
    p = problem(3, 40, 48, torch.float16, True, "silu")
    clean = PATHS[path](**p)
    wide = torch.full((40, 5), float("nan"), device=DEVICE)
    wide[:, 1:4] = p["scales"]
    record = torch.full((40, 150), -128, dtype=torch.int8, device=DEVICE)
    record[:, :144] = p["record"]
    assert torch.equal(PATHS[path](**{**p, "scales": wide[:, 1:4], "record": record[:, :144]}), clean)
    assert torch.equal(PATHS[path](**{**p, "scales": p["scales"].t().contiguous().t()}), clean)


def test_bad_scales_are_named_with_rule_and_value() -> None:
    p = problem(2, 8, 16, torch.float16, True, "silu")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"scales": None}, "scales must be given with an int8 record; got None"),
        ({"scales": p["scales"][:, :2]}, "scales must have shape (8, 3); got (8, 2)"),
        ({"scales": p["scales"].half()}, "scales must be torch.float32; got torch.float16"),
        ({"record": p["record"].half()}, "record must be torch.int8; got torch.float16"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.ffn(**{**p, **change})


def test_float32_on_compute_capability_10_needs_a_triton_that_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(checks.triton, "__version__", "3.6.0")
    assert "need Triton 3.9" in str(checks.why_no_int8(torch.float32, "cuda"))
    assert checks.why_no_int8(torch.bfloat16, "cuda") is None
    monkeypatch.setattr(checks.triton, "__version__", "3.9.0")
    assert checks.why_no_int8(torch.float32, "cuda") is None
