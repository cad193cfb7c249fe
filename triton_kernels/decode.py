"""Few tokens: one pass over the kept neurons, then a sum of partial results.

    program 0   neurons [0, S)      up, gate rows -> hidden [tokens, S] -> times down rows -> partial 0  [tokens, D]
    program 1   neurons [S, 2S)                                                            -> partial 1  [tokens, D]
    ...
    reduce      out = partial 0 + partial 1 + ... + down_bias + residual

Each record row is read once, and the hidden activations never leave the program. The slab width S depends on the
layer alone and a token's arithmetic never meets another token's, so a row of the result is bitwise the same in
every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import DecodeConfig
from .launch import Launch, Problem
from .tile import hidden_tile, record_rows


# K and M are used in masks along rows only: specialising on their values would compile anew for every pruned width.
@triton.jit(do_not_specialize=["M", "K"])
def slab_kernel(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    index,  # [K] int32 kept neurons, or None
    partial,  # out [slabs, M, D] float32
    M,  # number of tokens
    K,  # number of kept neurons
    D,  # hidden_size
    GATED: tl.constexpr,  # record has a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # bfloat16 values stored as float32
    BLOCK_M: tl.constexpr,  # tokens of a program
    SLAB: tl.constexpr,  # neurons of a program
    BLOCK_D: tl.constexpr,  # channels taken at once
):
    token_blocks = tl.cdiv(M, BLOCK_M)
    # Token blocks of one slab are neighbours in launch order: the second finds the slab's rows in the L2 cache.
    slab = tl.program_id(0) // token_blocks
    tokens = (tl.program_id(0) % token_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons = slab * SLAB + tl.arange(0, SLAB)
    live = neurons < K
    rows = record_rows(index, neurons, K)
    hidden = hidden_tile(
        x, x_stride, tokens, M, record, record_stride, rows, live, neuron_bias, bias_stride, D,
        GATED, ACTIVATION, BF16_BITS, BLOCK_M, SLAB, BLOCK_D,
    )  # fmt: skip
    hidden = hidden.to(x.dtype.element_ty)

    d = tl.arange(0, BLOCK_D)
    down_tile = record + rows[:, None] * record_stride + d[None, :]
    if GATED:
        down_tile += 2 * D
    else:
        down_tile += D
    out_tile = partial + (slab.to(tl.int64) * M + tokens)[:, None] * D + d[None, :]
    present = (tokens < M)[:, None]
    for start in range(0, D, BLOCK_D):
        inside = (start + d < D)[None, :]
        ws = tl.load(down_tile + start, mask=live[:, None] & inside, other=0.0)
        tl.store(out_tile + start, tl.dot(hidden, ws, input_precision="ieee"), mask=present & inside)


@triton.jit(do_not_specialize=["M", "slabs"])
def reduce_kernel(
    partial,  # [slabs, M, D] float32
    slabs,  # number of partials; 0 when no neuron is kept
    down_bias,  # [D] or None
    residual,  # [M, D] or None
    residual_stride,  # elements between residual rows
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
    slab_size = M.to(tl.int64) * D
    tile = partial + s[:, None] * slab_size + token * D + d[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, slabs, BLOCK_S):
        total += tl.load(tile + start * slab_size, mask=(start + s < slabs)[:, None] & inside[None, :], other=0.0)
    # The order of this sum is fixed when the kernel is compiled.
    row = tl.sum(total, axis=0)
    if down_bias is not None:
        row += tl.load(down_bias + d, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + token * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, row.to(out.dtype.element_ty), mask=inside)


def launches(p: Problem, out: torch.Tensor, config: DecodeConfig) -> list[Launch]:
    """The launches that write `out` `[M, D]`; no neuron is touched when none is kept."""
    slabs = triton.cdiv(p.k, config.slab)
    partial = torch.empty((slabs, p.m, p.d), dtype=torch.float32, device=p.x.device)
    plan = []
    if slabs:
        plan.append(
            Launch(
                slab_kernel,
                (triton.cdiv(p.m, config.block_m) * slabs,),
                {
                    **p.weights(),
                    "partial": partial,
                    "BLOCK_M": config.block_m,
                    "SLAB": config.slab,
                    "BLOCK_D": config.block_d,
                },
                config.num_warps,
                config.num_stages,
            )
        )
    plan.append(
        Launch(
            reduce_kernel,
            (p.m * triton.cdiv(p.d, config.reduce_d),),
            {
                "partial": partial,
                "slabs": slabs,
                **p.epilogue(out),
                "M": p.m,
                "D": p.d,
                "BLOCK_S": config.reduce_s,
                "BLOCK_D": config.reduce_d,
            },
            num_warps=4,
            num_stages=1,
        )
    )
    return plan
