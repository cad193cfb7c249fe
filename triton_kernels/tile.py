"""Tiles of both products, as the kernels share them: hidden activations, and sums of their products with down rows.

Tiles stand with the weights on the left, `[neurons, tokens] = W [neurons, D] @ x.T [D, tokens]`: the side on which the
matrix units work in 16 rows, or 64, has a neuron in each, and a single token fills one column of 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, round_like


@triton.jit
def record_rows(
    index,  # [K] int32, record row of each kept neuron; None: row k is neuron k
    neurons,  # [BLOCK] int32, numbers in 0..K-1, or beyond in the last block
    K,  # number of kept neurons
):
    """Rows of `record` to read, int64 so that a row's address cannot overflow. `[BLOCK]`"""
    if index is None:
        return neurons.to(tl.int64)
    else:
        return tl.load(index + neurons, mask=neurons < K, other=0).to(tl.int64)


@triton.jit
def unfold(
    total,  # float32, sums of hidden * down
    scales,  # as in finish
):
    """Takes back the power of two by which `finish` multiplied the hidden activations of an int8 record."""
    if scales is not None:
        total *= 0.0078125
    return total


@triton.jit
def finish(
    first,  # [BLOCK_N, BLOCK_M] float32, products with the first part of the record
    second,  # [BLOCK_N, BLOCK_M] float32, products with the up part of a gated one
    rows,  # [BLOCK_N] int64, record row of each neuron of the tile
    live,  # [BLOCK_N] bool, False for slots beyond the last kept neuron
    scales,  # [F, P] float32 of an int8 record, or None
    scales_stride,  # elements between rows of scales
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    storage: tl.constexpr,  # dtype of the hidden activations
    GATED: tl.constexpr,  # record has a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # see round_like
):
    """Hidden activations of a tile, `[BLOCK_N, BLOCK_M]`, float32 values of `storage`.

    Without scales they are rounded where the eager modules round. With scales they are rounded once, and are the
    activations times the scale of the down part times 128: such a product, times int8 / 128, is the neuron's share of
    the output, so that float16 holds the one wherever it holds the other.
    """
    if scales is not None:
        scale = scales + rows * scales_stride
        first *= tl.load(scale, mask=live, other=0.0)[:, None]
        if GATED:
            second *= tl.load(scale + 1, mask=live, other=0.0)[:, None]
    if neuron_bias is not None:
        bias = neuron_bias + rows * bias_stride
        first += tl.load(bias, mask=live, other=0.0).to(tl.float32)[:, None]
        if GATED:
            second += tl.load(bias + 1, mask=live, other=0.0).to(tl.float32)[:, None]
    if scales is None:
        hidden = round_like(activate(round_like(first, storage, BF16_BITS), ACTIVATION), storage, BF16_BITS)
        if GATED:
            hidden = round_like(hidden * round_like(second, storage, BF16_BITS), storage, BF16_BITS)
    else:
        hidden = activate(first, ACTIVATION)
        if GATED:
            hidden *= second
            scale += 1
        down_scale = tl.load(scale + 1, mask=live, other=0.0) * 128.0
        hidden = round_like(hidden * down_scale[:, None], storage, BF16_BITS)
    # Dead slots hold 0 @ x, which is NaN for an infinite x, and a NaN would survive the product with a zero down row.
    return tl.where(live[:, None], hidden, 0.0)


@triton.jit
def hidden_tile(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    tokens,  # [BLOCK_M] int32, token numbers
    present,  # [BLOCK_M] bool, False for slots beyond the last token
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    rows,  # [BLOCK_N] int64, record row of each neuron of the tile
    live,  # [BLOCK_N] bool, False for slots beyond the last kept neuron
    scales,  # [F, P] float32 of an int8 record, or None
    scales_stride,  # elements between rows of scales
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    D,  # hidden_size
    GATED: tl.constexpr,  # record has a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # see round_like
    BLOCK_M: tl.constexpr,  # tokens of the tile
    BLOCK_N: tl.constexpr,  # neurons of the tile
    BLOCK_D: tl.constexpr,  # channels of x taken at once
):
    """`act(up @ x.T)` or `act(gate @ x.T) * (up @ x.T)` as `finish` gives it, `[BLOCK_N, BLOCK_M]`."""
    storage: tl.constexpr = x.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    x_tile = x + tokens.to(tl.int64)[:, None] * x_stride + d[None, :]
    first_tile = record + rows[:, None] * record_stride + d[None, :]
    first = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + d < D)[None, :]
        xs = tl.trans(tl.load(x_tile + start, mask=present[:, None] & inside, other=0.0))
        ws = tl.load(first_tile + start, mask=live[:, None] & inside, other=0)
        first = tl.dot(ws.to(storage), xs, first, input_precision="ieee")
        if GATED:
            us = tl.load(first_tile + D + start, mask=live[:, None] & inside, other=0)
            second = tl.dot(us.to(storage), xs, second, input_precision="ieee")
    return finish(
        first, second, rows, live, scales, scales_stride, neuron_bias, bias_stride, storage,
        GATED, ACTIVATION, BF16_BITS,
    )  # fmt: skip


@triton.jit
def down_tile(
    hidden,  # [M, width], zero in columns K to the end of their block
    hidden_stride,  # elements between hidden rows
    tokens,  # [BLOCK_M] int32, hidden rows
    present,  # [BLOCK_M] bool, False for slots beyond the last token
    down,  # [F, D] view of the down part of the records
    record_stride,  # elements between record rows
    index,  # [K] int32 kept neurons, or None
    d,  # [BLOCK_N] int32, channels
    begin,  # first neuron, at the beginning of a block
    end,  # behind the last one
    K,  # number of kept neurons
    D,  # hidden_size
    BLOCK_M: tl.constexpr,  # tokens of the tile
    BLOCK_N: tl.constexpr,  # channels of the tile
    BLOCK_K: tl.constexpr,  # neurons taken at once; divides the width of hidden
    TOKENS_LEFT: tl.constexpr,  # tokens are the left operand, not the weights
):
    """`down.T @ hidden.T` over neurons [begin, end), `[BLOCK_N, BLOCK_M]` float32."""
    k = tl.arange(0, BLOCK_K)
    hidden_tiles = hidden + tokens.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    # Weights stand on the left where matrix instructions read them from shared memory. Where those read registers,
    # Triton brings a turned left operand in through registers too, and copies it asynchronously on the right only.
    if TOKENS_LEFT:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        neurons = start + k
        rows = record_rows(index, neurons, K)
        hs = tl.load(hidden_tiles + start, mask=present[:, None], other=0.0)
        mask = (neurons < K)[:, None] & (d < D)[None, :]
        ws = tl.load(down + rows[:, None] * record_stride + d[None, :], mask=mask, other=0)
        ws = ws.to(hidden.dtype.element_ty)
        if TOKENS_LEFT:
            total = tl.dot(hs, ws, total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(ws), tl.trans(hs), total, input_precision="ieee")
    if TOKENS_LEFT:
        total = tl.trans(total)
    return total
