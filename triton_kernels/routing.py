"""Which pairs of token and expert a program computes, and the sum of a token's pairs. Nothing waits for the device.

A call of `[T, K]` routing has T * K pairs, numbered as the routing lies. The pairs of an expert are put together, and
cut into tiles of BLOCK_M at most. How many tiles there are only the device knows: a table has a slot for each that
there can be, and programs of empty slots end at once. With `before` pairs of experts below e, tile b of e is in slot

    before // BLOCK_M + e + b

which no other tile has: an expert of n pairs has n // BLOCK_M + 1 tiles at most. So every expert finds its slots from
its own count and that of the pairs before it, in one launch.

A number that names no expert has no tile; `combine_kernel` makes its token NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import round_like
from .launch import Launch

# Numbers of the routing that a program looks at together.
_MOST_PAIRS = 4096


@triton.jit(do_not_specialize=["pairs", "slots", "E"])
def route_kernel(
    index,  # [pairs] integers, expert of each pair
    order,  # out [pairs] int32, pairs by expert, those of one expert as they came
    table,  # out [slots, 3] int32: expert, first place in order, pairs (0 where the slot is empty)
    pairs,  # number of pairs
    slots,  # pairs // BLOCK_M + E
    E,  # number of experts
    BLOCK_M: tl.constexpr,  # most pairs of a tile
    BLOCK: tl.constexpr,  # pairs looked at together
    SLOTS: tl.constexpr,  # slots written together
):
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], dtype=tl.int32)
    own = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, pairs, BLOCK):
        named = tl.load(index + start + i, mask=start + i < pairs, other=E)
        lower += (named < e).to(tl.int32)
        own += (named == e).to(tl.int32)
    before = tl.sum(lower, axis=0)
    count = tl.sum(own, axis=0)
    place = before
    for start in range(0, pairs, BLOCK):
        named = tl.load(index + start + i, mask=start + i < pairs, other=E)
        mine = (named == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, axis=0) - mine, start + i, mask=mine > 0)
        place += tl.sum(mine, axis=0)
    # Up to the first slot of the next expert; the first and the last also write what is left at either end.
    first = before // BLOCK_M + e
    begin = tl.where(e == 0, 0, first)
    end = tl.where(e == E - 1, slots, (before + count) // BLOCK_M + e + 1)
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        done = (slot - first) * BLOCK_M
        size = tl.where(done >= 0, tl.minimum(tl.maximum(count - done, 0), BLOCK_M), 0)
        row = table + slot * 3
        tl.store(row, tl.zeros([SLOTS], dtype=tl.int32) + e, mask=slot < end)
        tl.store(row + 1, before + done, mask=slot < end)
        tl.store(row + 2, size, mask=slot < end)


@triton.jit
def tile_at(
    slot,  # number of the tile
    index,  # [pairs] integers, expert of each pair
    table,  # as route_kernel wrote it; None: every pair is a tile
    E,  # number of experts
):
    """Expert, first place in order, and number of pairs of a tile: 0 where there is nothing to compute."""
    if table is None:
        named = tl.load(index + slot)
        size = tl.where((named >= 0) & (named < E), 1, 0)
        return named.to(tl.int32), slot, size
    else:
        row = table + slot * 3
        return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def pairs_at(
    order,  # as route_kernel wrote it; None: pairs as they come
    places,  # [BLOCK_M] int32, places in order
    present,  # [BLOCK_M] bool, those that there are
):
    """Numbers of the pairs at these places. `[BLOCK_M]`"""
    if order is None:
        return tl.where(present, places, 0)
    else:
        return tl.load(order + places, mask=present, other=0)


@triton.jit(do_not_specialize=["pairs", "splits", "E", "picked"])
def combine_kernel(
    partial,  # [splits, pairs, D] results of the pairs
    index,  # [pairs] integers, expert of each pair
    weights,  # [pairs] floating point, what its result is multiplied by
    out,  # out [T, D]
    pairs,  # number of pairs
    splits,  # partial results of a pair
    E,  # number of experts
    picked,  # pairs of a token, which lie together
    D,  # hidden_size
    BF16_BITS: tl.constexpr,  # see round_like
    BLOCK_S: tl.constexpr,  # partial results taken at once
    BLOCK_D: tl.constexpr,  # channels of a program
):
    blocks = tl.cdiv(D, BLOCK_D)
    token = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    inside = d < D
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for start in range(0, picked * splits, BLOCK_S):
        term = start + s
        there = term < picked * splits
        pair = token * picked + term // splits
        named = tl.load(index + pair, mask=there, other=0)
        weight = tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)
        place = (term % splits).to(tl.int64) * pairs + pair
        known = there & (named >= 0) & (named < E)
        share = tl.load(partial + place[:, None] * D + d[None, :], mask=known[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
        # 0 where there is no term, NaN where there is no expert.
        weight = tl.where(there & (known == 0), float("nan"), weight)
        total += share * weight[:, None]
    # The order of this sum is fixed when the kernel is compiled.
    row = round_like(tl.sum(total, axis=0), out.dtype.element_ty, BF16_BITS)
    tl.store(out + token.to(tl.int64) * D + d, row.to(out.dtype.element_ty), mask=inside)


def slots(pairs: int, experts: int, block_m: int) -> int:
    """Tiles that so many pairs can have at the most, as the table counts them."""
    return pairs // block_m + experts


def route(index: Tensor, experts: int, block_m: int) -> tuple[Launch, Tensor, Tensor]:
    """The launch that writes order and table of `index` `[pairs]`, and these two."""
    pairs = len(index)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    table = torch.empty((slots(pairs, experts, block_m), 3), dtype=torch.int32, device=index.device)
    block = min(_MOST_PAIRS, max(16, triton.next_power_of_2(pairs)))
    arguments: dict[str, Any] = {
        "index": index,
        "order": order,
        "table": table,
        "pairs": pairs,
        "slots": len(table),
        "E": experts,
        "BLOCK_M": block_m,
        "BLOCK": block,
        "SLOTS": 32,
    }
    return Launch(route_kernel, (experts,), arguments, num_warps=8 if block > 1024 else 4, num_stages=1), order, table


def combine(
    partial: Tensor, index: Tensor, weights: Tensor, out: Tensor, experts: int, picked: int, bf16_bits: bool
) -> Launch:
    """The launch that writes `out` `[T, D]` from `partial` `[splits, T * picked, D]`."""
    splits, pairs, d = partial.shape
    tokens = len(out)
    # By what a token has to sum and by the width alone, so that its bits do not follow the number of tokens.
    block_s = max(2, min(16, triton.next_power_of_2(max(1, picked * splits))))
    block_d = min(128, max(16, triton.next_power_of_2(d)))
    arguments: dict[str, Any] = {
        "partial": partial,
        "index": index,
        "weights": weights,
        "out": out,
        "pairs": pairs,
        "splits": splits,
        "E": experts,
        "picked": picked,
        "D": d,
        "BF16_BITS": bf16_bits,
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
    }
    return Launch(combine_kernel, (tokens * triton.cdiv(d, block_d),), arguments, num_warps=4, num_stages=1)
