"""Many tokens: two matrix products on the matrix units, the hidden activations in between.

    hidden [M, K] = act(x @ up.T)   or   act(x @ gate.T) * (x @ up.T)
    out    [M, D] = hidden @ down + down_bias + residual

`hidden` is padded to whole blocks of neurons, and the first kernel writes zeros there: the second then needs no mask
along a hidden row, whose width K is arbitrary, and its loads stay 16 bytes wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import PrefillConfig
from .launch import Launch, Problem
from .tile import hidden_tile, record_rows


@triton.jit
def _tile_of(
    pid,  # program number
    rows,  # row blocks of the output
    columns,  # column blocks of the output
    GROUP: tl.constexpr,  # row blocks that share column blocks before the next column block comes
):
    """Program number -> (row block, column block), in bands of GROUP row blocks: operands stay in the L2 cache."""
    band = pid // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    within = pid % (GROUP * columns)
    return band * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["M", "K"])
def hidden_kernel(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    index,  # [K] int32 kept neurons, or None
    hidden,  # out [M, width], width = K rounded up to BLOCK_N
    hidden_stride,  # elements between hidden rows
    M,  # number of tokens
    K,  # number of kept neurons
    D,  # hidden_size
    GATED: tl.constexpr,  # record has a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # bfloat16 values stored as float32
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # neurons of a program
    BLOCK_D: tl.constexpr,  # channels of x taken at once
    GROUP: tl.constexpr,  # see _tile_of
):
    row_block, column_block = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    tokens = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = hidden_tile(
        x, x_stride, tokens, M, record, record_stride, record_rows(index, neurons, K), neurons < K, neuron_bias,
        bias_stride, D, GATED, ACTIVATION, BF16_BITS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    place = hidden + tokens.to(tl.int64)[:, None] * hidden_stride + neurons[None, :]
    tl.store(place, tile.to(hidden.dtype.element_ty), mask=(tokens < M)[:, None])


@triton.jit(do_not_specialize=["M", "K"])
def down_kernel(
    hidden,  # [M, width], zero in columns K and beyond
    hidden_stride,  # elements between hidden rows
    down,  # [F, D] view of the down part of the records
    record_stride,  # elements between record rows
    index,  # [K] int32 kept neurons, or None
    down_bias,  # [D] or None
    residual,  # [M, D] or None
    residual_stride,  # elements between residual rows
    out,  # out [M, D]
    M,  # number of tokens
    K,  # number of kept neurons
    D,  # hidden_size
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # channels of a program
    BLOCK_K: tl.constexpr,  # neurons taken at once; divides the width of hidden
    GROUP: tl.constexpr,  # see _tile_of
):
    row_block, column_block = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    tokens = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    present = (tokens < M)[:, None]
    inside = (d < D)[None, :]
    hidden_tiles = hidden + tokens.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        neurons = start + k
        rows = record_rows(index, neurons, K)
        hs = tl.load(hidden_tiles + start, mask=present, other=0.0)
        ws = tl.load(down + rows[:, None] * record_stride + d[None, :], mask=(neurons < K)[:, None] & inside, other=0.0)
        total = tl.dot(hs, ws, total, input_precision="ieee")

    if down_bias is not None:
        total += tl.load(down_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = residual + tokens.to(tl.int64)[:, None] * residual_stride + d[None, :]
        total += tl.load(place, mask=present & inside, other=0.0).to(tl.float32)
    place = out + tokens.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=present & inside)


def launches(p: Problem, out: torch.Tensor, config: PrefillConfig) -> list[Launch]:
    """The two launches that write `out` `[M, D]`; needs at least one kept neuron."""
    up, down = config.hidden, config.down
    columns = triton.cdiv(p.k, up.block_n)
    hidden = torch.empty((p.m, columns * up.block_n), dtype=p.x.dtype, device=p.x.device)
    return [
        Launch(
            hidden_kernel,
            (triton.cdiv(p.m, up.block_m) * columns,),
            {
                **p.weights(),
                "hidden": hidden,
                "hidden_stride": hidden.stride(0),
                "BLOCK_M": up.block_m,
                "BLOCK_N": up.block_n,
                "BLOCK_D": up.block_k,
                "GROUP": config.group,
            },
            up.num_warps,
            up.num_stages,
        ),
        Launch(
            down_kernel,
            (triton.cdiv(p.m, down.block_m) * triton.cdiv(p.d, down.block_n),),
            {
                "hidden": hidden,
                "hidden_stride": hidden.stride(0),
                "down": p.record[:, -p.d :],
                "record_stride": p.record.stride(0),
                "index": p.index,
                **p.epilogue(out),
                "M": p.m,
                "K": p.k,
                "D": p.d,
                "BLOCK_M": down.block_m,
                "BLOCK_N": down.block_n,
                "BLOCK_K": down.block_k,
                "GROUP": config.group,
            },
            down.num_warps,
            down.num_stages,
        ),
    ]
