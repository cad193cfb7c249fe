"""The two matrix products with tensor descriptors: from sm_90 on hardware moves whole tiles, and computes no addresses.

For compact records with aligned parts in the dtype of x. The copies fill what lies outside a tensor with zeros, so no
load has a mask. The arithmetic is that of `prefill`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import PrefillConfig
from .hardware import has_descriptors
from .launch import Operands
from .products import split_of, store_down, tile_of
from .tile import finish


@triton.jit(do_not_specialize=["M", "K", "width"])
def hidden_descriptor_kernel(
    x,  # descriptor of tokens [M, D], blocks [BLOCK_M, BLOCK_D]
    first,  # descriptor of the first part of the records, [F, D], blocks [BLOCK_N, BLOCK_D]
    second,  # descriptor of the up part of gated records, or None
    neuron_bias,  # [F, P-1] or None
    bias_stride,  # elements between bias rows
    hidden,  # out, descriptor of [M, width], blocks [BLOCK_M, BLOCK_N]
    width,  # K rounded up to whole blocks, of this product and of the next
    M,  # number of tokens
    K,  # number of kept neurons, F
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
    row, column = row_block * BLOCK_M, column_block * BLOCK_N
    one = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    two = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        xs = tl.trans(x.load([row, start]))
        one = tl.dot(first.load([column, start]), xs, one, input_precision="ieee")
        if GATED:
            two = tl.dot(second.load([column, start]), xs, two, input_precision="ieee")
    neurons = column + tl.arange(0, BLOCK_N)
    tile = finish(
        one, two, neurons.to(tl.int64), neurons < K, None, 0, neuron_bias, bias_stride, hidden.dtype,
        GATED, ACTIVATION, BF16_BITS,
    )  # fmt: skip
    hidden.store([row, column], tl.trans(tile.to(hidden.dtype)))


@triton.jit(do_not_specialize=["M", "K", "splits"])
def down_descriptor_kernel(
    hidden,  # descriptor of [M, width], zero in columns K and beyond, blocks [BLOCK_M, BLOCK_K]
    down,  # descriptor of the down part of the records, [F, D], blocks [BLOCK_K, BLOCK_N]
    down_bias,  # [D] or None
    partial,  # out [splits, M, D] float32, or None
    out,  # out [M, D] where there is no partial
    M,  # number of tokens
    K,  # number of kept neurons, F
    D,  # hidden_size
    splits,  # programs that share the neurons
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,  # channels of a program
    BLOCK_K: tl.constexpr,  # neurons taken at once; divides the width of hidden
    GROUP: tl.constexpr,  # see tile_of
):
    split = tl.program_id(0) % splits
    row_block, column_block = tile_of(tl.program_id(0) // splits, tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    begin, end = split_of(split, splits, K, BLOCK_K)
    row, column = row_block * BLOCK_M, column_block * BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        ws = tl.trans(down.load([start, column]))
        total = tl.dot(ws, tl.trans(hidden.load([row, start])), total, input_precision="ieee")
    tokens, d = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    store_down(total, tokens, d, split, None, down_bias, partial, out, M, D)


def why_not(p: Operands) -> str | None:
    """Why these kernels cannot run `p`, in one line, or None."""
    if p.index is not None:
        return "descriptors describe compact records, and this call has an index"
    if p.scales is not None:
        return "descriptors are for records in the dtype of x, and this record is int8"
    if not p.aligned:
        return "descriptors need record parts on 16-byte boundaries"
    if not has_descriptors(p.architecture):
        return "descriptors need compute capability 9.0 or newer"
    return None


def _fit(rows: Tensor) -> Tensor:
    """`rows` where a descriptor can begin and step, copied if need be; the copy of a few columns is cheap."""
    steps = rows.stride(0) * rows.element_size() % 16 == 0 and rows.stride(1) == 1
    return rows if steps and rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def arguments(
    p: Operands, hidden: Tensor, config: PrefillConfig, blocks: dict[str, Any], down_arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the two kernels.

    Args:
        p: the problem, for which `why_not` is None.
        hidden: `[M, width]` for the activations.
        config: tiles.
        blocks: block sizes of the first kernel.
        down_arguments: what the second has in common with `prefill.down_kernel`.
    """
    up, down = config.hidden, config.down
    d = p.d

    def part(i: int, tile: list[int]) -> TensorDescriptor:
        return TensorDescriptor(p.record[:, i * d : (i + 1) * d], [p.k, d], [p.record.stride(0), 1], tile)

    def hidden_rows(tile: list[int]) -> TensorDescriptor:
        return TensorDescriptor(hidden, list(hidden.shape), list(hidden.stride()), tile)

    x = _fit(p.x)
    first = {
        "x": TensorDescriptor(x, [p.m, d], [x.stride(0), 1], [up.block_m, up.block_k]),
        "first": part(0, [up.block_n, up.block_k]),
        "second": part(1, [up.block_n, up.block_k]) if p.gated else None,
        "neuron_bias": p.neuron_bias,
        "bias_stride": 0 if p.neuron_bias is None else p.neuron_bias.stride(0),
        "hidden": hidden_rows([up.block_m, up.block_n]),
        "width": hidden.shape[1],
        "M": p.m,
        "K": p.k,
        "D": d,
        "GATED": p.gated,
        "ACTIVATION": p.activation,
        "BF16_BITS": p.bf16_bits,
        **blocks,
    }
    second = {
        "hidden": hidden_rows([down.block_m, down.block_k]),
        "down": part(2 if p.gated else 1, [down.block_k, down.block_n]),
        **down_arguments,
    }
    return first, second
