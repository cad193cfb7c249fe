"""The last step where neurons were shared out: partial results and down bias summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launch, Operands


def _blocks(partials: int) -> tuple[int, int, int]:
    """Partials taken at once, channels of a program, warps: by the number of partials, whatever that of tokens.

    Slabs are many and tokens few: full 128-byte lines, one or two rounds for most layers. Splits are few, and tokens
    may be many: a program takes all of them at once for more channels.
    """
    if partials > 16:
        return 128, 32, 8
    return max(2, triton.next_power_of_2(partials)), 256, 4


@triton.jit(do_not_specialize=["M", "partials"])
def reduce_kernel(
    partial,  # [partials, M, D] float32
    partials,  # number of partials; 0 when no neuron is kept
    down_bias,  # [D] or None
    out,  # out [M, D]
    M,  # number of tokens
    D,  # hidden_size
    BLOCK_S: tl.constexpr,  # partials taken at once
    BLOCK_D: tl.constexpr,  # channels of a program
):
    channel_blocks = tl.cdiv(D, BLOCK_D)
    token = (tl.program_id(0) // channel_blocks).to(tl.int64)
    d = (tl.program_id(0) % channel_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    inside = d < D
    size = M.to(tl.int64) * D
    tile = partial + s[:, None] * size + token * D + d[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, partials, BLOCK_S):
        total += tl.load(tile + start * size, mask=(start + s < partials)[:, None] & inside[None, :], other=0.0)
    # The order of this sum is fixed when the kernel is compiled.
    row = tl.sum(total, axis=0)
    if down_bias is not None:
        row += tl.load(down_bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, row.to(out.dtype.element_ty), mask=inside)


def launch(p: Operands, partial: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes `out` `[M, D]` from `partial` `[partials, M, D]`."""
    block_s, block_d, warps = _blocks(partial.shape[0])
    return Launch(
        reduce_kernel,
        (p.m * triton.cdiv(p.d, block_d),),
        {
            "partial": partial,
            "partials": partial.shape[0],
            **p.epilogue(out),
            "M": p.m,
            "D": p.d,
            "BLOCK_S": block_s,
            "BLOCK_D": block_d,
        },
        num_warps=warps,
        num_stages=1,
    )
