"""Activations and rounding as device functions, from primitives that the interpreter and every target have."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu", "quick_gelu")


@triton.jit
def _sigmoid(z):
    # exp of a non-positive number cannot overflow, whichever sign z has.
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def activate(
    z,  # float32, any shape: pre-activations
    ACTIVATION: tl.constexpr,  # one of ACTIVATIONS
):
    """`act(z)` in float32. Every act(0) is 0, so neurons of zero padding stay silent."""
    if ACTIVATION == "gelu":
        # z * Phi(z), Phi(z) = (1 + erf(z / sqrt(2))) / 2
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) * (z + 0.044715 z^3)
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        # A NaN compares false and passes through, as in torch; a maximum would hide it.
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu2":
        r = tl.where(z < 0, 0.0, z)
        return r * r
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
        return z * _sigmoid(1.702 * z)


@triton.jit
def round_like(
    v,  # float32, any shape
    DTYPE: tl.constexpr,  # dtype that the tensors are stored in
    BF16_BITS: tl.constexpr,  # the tensors are bfloat16 values stored as float32
):
    """`v` rounded to the nearest value (ties to even) of the model's dtype, kept in float32."""
    if BF16_BITS:
        # bfloat16 is the upper half of float32. Adding just under half of the last place kept, plus that place's own
        # bit, makes the truncation round to nearest even. NaN is kept apart: the addition could turn it into infinity.
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    else:
        return v.to(DTYPE).to(tl.float32)
