"""`act_mul` against torch, on a GPU (`-m gpu`) or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pyprune import triton_kernels as kernels
from pyprune.base import reference

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def values(m: int, f: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((m, f), generator=generator) * 2).to(dtype).to(DEVICE)


def check(out: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> None:
    """Every element: at most twice torch's own error, or two units in the last place.

    Units of the result in half precision; in float32 of the argument too, as tails that vanish lose relative accuracy.
    """
    act = reference.ACTIVATIONS[activation]
    truth, eager = act(gate.double()), act(gate)
    scale = torch.maximum(truth.abs(), gate.double().abs() * (gate.dtype == torch.float32))
    if up is not None:
        truth, eager, scale = truth * up.double(), eager * up, scale * up.double().abs()
    assert out.dtype == gate.dtype
    # Far out even the float64 truth is a difference of ones, and float16 has few bits.
    limits = torch.finfo(gate.dtype)
    tail = max(1e-14, limits.eps * limits.smallest_normal)
    allowed = torch.maximum(2 * (eager.double() - truth).abs(), 2 * limits.eps * scale + tail)
    assert ((out.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paired", [False, True], ids=["alone", "times_up"])
@pytest.mark.parametrize(("m", "f"), [(1, 1), (3, 65), (2, 1100), (5, 1024)])
def test_every_activation_dtype_and_width(activation: str, dtype: torch.dtype, paired: bool, m: int, f: int) -> None:
    gate, up = values(m, f, dtype), values(m, f, dtype, seed=1) if paired else None
    check(kernels.act_mul(gate, up, activation), gate, up, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_halves_of_one_product_in_place(dtype: torch.dtype) -> None:
    both = values(4, 66, dtype)
    gate, up = both[:, :33], both[:, 33:]
    wanted = kernels.act_mul(gate.contiguous(), up.contiguous(), "silu")
    kept = up.clone()
    assert kernels.act_mul(gate, up, "silu", out=gate) is gate
    assert torch.equal(gate, wanted)
    assert torch.equal(up, kept)


def test_relu_times_up_is_eager_to_the_bit() -> None:
    for dtype in DTYPES:
        gate, up = values(3, 70, dtype), values(3, 70, dtype, seed=1)
        assert torch.equal(kernels.act_mul(gate, up, "relu"), torch.relu(gate) * up)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, device=DEVICE)
    assert kernels.act_mul(empty, empty, "gelu").shape == shape


def test_bad_arguments_are_named_with_rule_and_value() -> None:
    gate = values(3, 8, torch.float32)
    bad: list[tuple[tuple[Tensor, Tensor | None, str, Tensor | None], str]] = [
        ((gate, None, "gelu_new", None), "activation must be one of gelu"),
        ((gate.double(), None, "gelu", None), "gate must be float32, float16 or bfloat16; got torch.float64"),
        ((gate[0], None, "gelu", None), "gate must have shape [M, F]; got (8,)"),
        ((gate.t().contiguous().t(), None, "gelu", None), "gate must have contiguous rows; got strides (1, 3)"),
        ((gate, gate[:2], "gelu", None), "up must have shape (3, 8); got (2, 8)"),
        ((gate, gate.half(), "gelu", None), "up must be torch.float32; got torch.float16"),
        ((gate, None, "gelu", gate.to("meta")), "out must be on the device of gate"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.act_mul(*arguments)
