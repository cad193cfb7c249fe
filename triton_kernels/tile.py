"""The half of the FFN that decode and prefill share: a tile of hidden activations."""

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
def hidden_tile(
    x,  # [M, D] tokens
    x_stride,  # elements between tokens
    tokens,  # [BLOCK_M] int32, token numbers
    M,  # number of tokens
    record,  # [F, P*D] rows [up | down] or [gate | up | down]
    record_stride,  # elements between record rows
    rows,  # [BLOCK_N] int64, record row of each neuron of the tile
    live,  # [BLOCK_N] bool, False for slots beyond the last kept neuron
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
    """`act(x @ up.T)` or `act(x @ gate.T) * (x @ up.T)`, rounded where the eager modules round. `[BLOCK_M, BLOCK_N]`"""
    storage: tl.constexpr = x.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    x_tile = x + tokens.to(tl.int64)[:, None] * x_stride + d[None, :]
    first_tile = record + rows[:, None] * record_stride + d[None, :]
    present = (tokens < M)[:, None]
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + d < D)[None, :]
        xs = tl.load(x_tile + start, mask=present & inside, other=0.0)
        ws = tl.load(first_tile + start, mask=live[:, None] & inside, other=0.0)
        first = tl.dot(xs, tl.trans(ws), first, input_precision="ieee")
        if GATED:
            us = tl.load(first_tile + D + start, mask=live[:, None] & inside, other=0.0)
            second = tl.dot(xs, tl.trans(us), second, input_precision="ieee")

    if neuron_bias is not None:
        bias = neuron_bias + rows * bias_stride
        first += tl.load(bias, mask=live, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias + 1, mask=live, other=0.0).to(tl.float32)[None, :]
    hidden = round_like(activate(round_like(first, storage, BF16_BITS), ACTIVATION), storage, BF16_BITS)
    if GATED:
        hidden = round_like(hidden * round_like(second, storage, BF16_BITS), storage, BF16_BITS)
    # Dead slots hold x @ 0, which is NaN for an infinite x, and a NaN would survive the product with a zero down row.
    return tl.where(live[None, :], hidden, 0.0)
