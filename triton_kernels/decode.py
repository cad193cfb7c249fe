"""Few tokens: one pass over the kept neurons, then a sum of partial results.

    program 0   neurons [0, S)      up, gate rows -> hidden [S, tokens] -> times down rows -> partial 0  [tokens, D]
    program 1   neurons [S, 2S)                                                            -> partial 1  [tokens, D]
    ...
    reduce      out = partial 0 + partial 1 + ... + down_bias

Each record row is read once, and the hidden activations never leave the program. The slab width S depends on the
layer alone and a token's arithmetic never meets another token's, so a row of the result is bitwise the same in
every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import reduce
from .config import DecodeConfig
from .launch import Launch, Operands
from .tile import hidden_tile, record_rows, unfold


# K and M are used in masks along rows only: specialising on their values would compile anew for every pruned width.
@triton.jit(do_not_specialize=["M", "K"])
def slab_kernel(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    scales,  # [F, P] float32 of an int8 record, or None
    scales_stride,  # elements between rows of scales
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
    # Token blocks of one slab are neighbours in launch order: the second finds the slab's rows in the L2 cache.
    token_blocks = tl.cdiv(M, BLOCK_M)
    slab = tl.program_id(0) // token_blocks
    tokens = (tl.program_id(0) % token_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = tokens < M
    neurons = slab * SLAB + tl.arange(0, SLAB)
    live = neurons < K
    rows = record_rows(index, neurons, K)
    hidden = hidden_tile(
        x, x_stride, tokens, present, record, record_stride, rows, live, scales, scales_stride, neuron_bias,
        bias_stride, D, GATED, ACTIVATION, BF16_BITS, BLOCK_M, SLAB, BLOCK_D,
    )  # fmt: skip
    hidden = hidden.to(x.dtype.element_ty)

    d = tl.arange(0, BLOCK_D)
    down_tile = record + rows[:, None] * record_stride + d[None, :]
    if GATED:
        down_tile += 2 * D
    else:
        down_tile += D
    out_tile = partial + (slab.to(tl.int64) * M + tokens)[None, :] * D + d[:, None]
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        ws = tl.load(down_tile + start, mask=live[:, None] & inside[None, :], other=0)
        share = tl.dot(tl.trans(ws.to(x.dtype.element_ty)), hidden, input_precision="ieee")
        tl.store(out_tile + start, unfold(share, scales), mask=inside[:, None] & present[None, :])


def launches(p: Operands, out: torch.Tensor, config: DecodeConfig) -> list[Launch]:
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
    plan.append(reduce.launch(p, partial, out))
    return plan
