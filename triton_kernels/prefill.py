"""More tokens: two matrix products on the matrix units, the hidden activations in between.

    hidden [M, K] = act(x @ up.T)   or   act(x @ gate.T) * (x @ up.T)
    out    [M, D] = hidden @ down + down_bias

`hidden` is padded to whole blocks of neurons, and the first kernel writes zeros there: the second then needs no mask
along a hidden row, whose width K is arbitrary, and its loads stay 16 bytes wide.

With few tokens the second product has too few tiles to fill a device, so it shares out the neurons as well: each
split writes a partial result, and `reduce` sums them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import descriptors, reduce
from .config import PrefillConfig
from .hardware import multiplies_from_shared
from .launch import Launch, Operands
from .products import split_of, store_down, tile_of
from .tile import down_tile, hidden_tile, record_rows


@triton.jit(do_not_specialize=["M", "K", "width"])
def hidden_kernel(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    scales,  # [F, P] float32 of an int8 record, or None
    scales_stride,  # elements between rows of scales
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    index,  # [K] int32 kept neurons, or None
    hidden,  # out [M, width]
    hidden_stride,  # elements between hidden rows
    width,  # K rounded up to whole blocks, of this product and of the next
    M,  # number of tokens
    K,  # number of kept neurons
    D,  # hidden_size
    GATED: tl.constexpr,  # record has a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # bfloat16 values stored as float32
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # neurons of a program
    BLOCK_D: tl.constexpr,  # channels of x taken at once
    GROUP: tl.constexpr,  # see tile_of
):
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), width // BLOCK_N, GROUP)
    tokens = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    neurons = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = tokens < M
    tile = hidden_tile(
        x, x_stride, tokens, present, record, record_stride, record_rows(index, neurons, K), neurons < K,
        scales, scales_stride, neuron_bias, bias_stride, D, GATED, ACTIVATION, BF16_BITS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    place = hidden + tokens.to(tl.int64)[None, :] * hidden_stride + neurons[:, None]
    tl.store(place, tile.to(hidden.dtype.element_ty), mask=present[None, :])


@triton.jit(do_not_specialize=["M", "K", "splits"])
def down_kernel(
    hidden,  # [M, width], zero in columns K to the end of their block
    hidden_stride,  # elements between hidden rows
    down,  # [F, D] view of the down part of the records
    record_stride,  # elements between record rows
    scales,  # of an int8 record, or None
    index,  # [K] int32 kept neurons, or None
    down_bias,  # [D] or None
    partial,  # out [splits, M, D] float32, or None
    out,  # out [M, D] where there is no partial
    M,  # number of tokens
    K,  # number of kept neurons
    D,  # hidden_size
    splits,  # programs that share the neurons
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # channels of a program
    BLOCK_K: tl.constexpr,  # neurons taken at once; divides the width of hidden
    TOKENS_LEFT: tl.constexpr,  # see down_tile
    GROUP: tl.constexpr,  # see tile_of
):
    split = tl.program_id(0) % splits
    row_block, column_block = tile_of(tl.program_id(0) // splits, tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    begin, end = split_of(split, splits, K, BLOCK_K)
    tokens = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = down_tile(
        hidden, hidden_stride, tokens, tokens < M, down, record_stride, index, d, begin, end, K, D,
        BLOCK_M, BLOCK_N, BLOCK_K, TOKENS_LEFT,
    )  # fmt: skip
    store_down(total, tokens, d, split, scales, down_bias, partial, out, M, D)


def launches(p: Operands, out: torch.Tensor, config: PrefillConfig) -> list[Launch]:
    """The launches that write `out` `[M, D]`; needs at least one kept neuron."""
    up, down = config.hidden, config.down
    whole = max(up.block_n, down.block_k)
    width = triton.cdiv(p.k, whole) * whole
    hidden = torch.empty((p.m, width), dtype=p.x.dtype, device=p.x.device)
    partial = None
    if config.splits > 1:
        partial = torch.empty((config.splits, p.m, p.d), dtype=torch.float32, device=p.x.device)
    blocks = {"BLOCK_M": up.block_m, "BLOCK_N": up.block_n, "BLOCK_D": up.block_k, "GROUP": config.group}
    down_blocks = {"BLOCK_M": down.block_m, "BLOCK_N": down.block_n, "BLOCK_K": down.block_k, "GROUP": config.group}
    down_arguments = {
        **p.epilogue(out),
        "partial": partial,
        "M": p.m,
        "K": p.k,
        "D": p.d,
        "splits": config.splits,
        **down_blocks,
    }
    grids = (
        (triton.cdiv(p.m, up.block_m) * (width // up.block_n),),
        (triton.cdiv(p.m, down.block_m) * triton.cdiv(p.d, down.block_n) * config.splits,),
    )
    if config.descriptors:
        kernels = (descriptors.hidden_descriptor_kernel, descriptors.down_descriptor_kernel)
        arguments = descriptors.arguments(p, hidden, config, blocks, down_arguments)
    else:
        kernels = (hidden_kernel, down_kernel)
        rows = {"hidden": hidden, "hidden_stride": hidden.stride(0)}
        first = {**p.weights(), **rows, "width": width, **blocks}
        second = {
            **rows,
            "down": p.record[:, -p.d :],
            "record_stride": p.record.stride(0),
            "scales": p.scales,
            "index": p.index,
            "TOKENS_LEFT": p.x.dtype != torch.float32 and not multiplies_from_shared(p.architecture),
            **down_arguments,
        }
        arguments = (first, second)
    plan = [
        Launch(kernel, grid, given, tile.num_warps, tile.num_stages)
        for kernel, grid, given, tile in zip(kernels, grids, arguments, (up, down), strict=True)
    ]
    if partial is not None:
        plan.append(reduce.launch(p, partial, out))
    return plan
