"""`act(gate) * up` elementwise, for a path whose matrix products another library computes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, activate, round_like
from .checks import DTYPES, INTERPRETED, require, require_device
from .launch import Launch, device_of

# Columns of a program: with 4 warps a thread moves 8 elements, 16 bytes in half precision.
_BLOCK = 1024


# F is specialised on: masks along a row must be known to cover whole vectors for 16-byte accesses.
@triton.jit
def act_mul_kernel(
    gate,  # [M, F] pre-activations
    gate_stride,  # elements between gate rows
    up,  # [M, F], or None
    up_stride,  # elements between up rows
    out,  # out [M, F], may be gate
    out_stride,  # elements between out rows
    F,  # columns
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # see round_like
    BLOCK: tl.constexpr,  # columns of a program
):
    storage: tl.constexpr = gate.dtype.element_ty
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    a = activate(tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    a = round_like(a, storage, BF16_BITS)
    if up is not None:
        a *= tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
        a = round_like(a, storage, BF16_BITS)
    tl.store(out + row * out_stride + f, a.to(storage), mask=inside)


def launch(gate: Tensor, up: Tensor | None, out: Tensor, activation: str, bf16_bits: bool = False) -> Launch:
    """The launch that writes `out` `[M, F]`; all with contiguous rows."""
    m, f = gate.shape
    arguments: dict[str, Any] = {
        "gate": gate,
        "gate_stride": gate.stride(0),
        "up": up,
        "up_stride": 0 if up is None else up.stride(0),
        "out": out,
        "out_stride": out.stride(0),
        "F": f,
        "ACTIVATION": activation,
        "BF16_BITS": bf16_bits,
        "BLOCK": _BLOCK,
    }
    return Launch(act_mul_kernel, (m * triton.cdiv(f, _BLOCK),), arguments, num_warps=4, num_stages=1)


def _check(gate: Tensor, up: Tensor | None, activation: str, out: Tensor | None) -> None:
    require(activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", activation)
    require(gate.dtype in DTYPES, "gate", "be float32, float16 or bfloat16", gate.dtype)
    require(gate.dim() == 2, "gate", "have shape [M, F]", tuple(gate.shape))
    for name, tensor in (("gate", gate), ("up", up), ("out", out)):
        if tensor is None:
            continue
        require(tensor.shape == gate.shape, name, f"have shape {tuple(gate.shape)}", tuple(tensor.shape))
        require(tensor.dtype == gate.dtype, name, f"be {gate.dtype}", tensor.dtype)
        require(tensor.device == gate.device, name, f"be on the device of gate, {gate.device}", tensor.device)
        contiguous = tensor.shape[1] <= 1 or tensor.stride(1) == 1
        require(contiguous, name, "have contiguous rows", f"strides {tensor.stride()}")


def act_mul(gate: Tensor, up: Tensor | None, activation: str, out: Tensor | None = None) -> Tensor:
    """`act(gate) * up`, or `act(gate)` without `up`, rounded to the dtype after each of the two, as eager modules do.

    Args:
        gate: `[M, F]` float32, float16 or bfloat16, contiguous along a row, any distance between rows.
        up: as `gate`, or None.
        activation: one of `ACTIVATIONS`.
        out: `[M, F]`, as `gate`, and may be `gate` or `up` itself; None allocates.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, device, stride or name breaks the rules above, or the device cannot run Triton.
    """
    _check(gate, up, activation, out)
    require_device(gate, "gate")
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    with device_of(gate):
        if INTERPRETED and gate.dtype == torch.bfloat16:
            wide = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
            launch(gate.float(), None if up is None else up.float(), wide, activation, bf16_bits=True).run()
            out.copy_(wide)
        else:
            launch(gate, up, out, activation).run()
    return out
