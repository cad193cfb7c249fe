"""int4 rows: weights in groups of 32 along D, each with a scale of its own, in one run of bytes for each neuron.

A part of a row is D/2 bytes of pairs, then one bfloat16 scale for each group: weight = integer * scale, the integer in
[-8, 7]. The scale is minus an eighth of the group's largest weight, with its sign, so that this weight becomes -8: an
eighth finer than a scale of largest / 7. It is cut to bfloat16, not rounded: -8 * scale then fits wherever the weight
did, and has no more digits than bfloat16. So weights that were written out, even in bfloat16, give the same row again.
A float16 scale would do neither, and gains nothing: the error is the same to four digits.

Of the 16 bytes of a group, byte j of the 32-bit word i holds elements 8j + i (low half) and 8j + 4 + i (high half), in
two's complement. So a word's eight halves, from the lowest up, are elements i, 4 + i, ..., 28 + i: vectors of words
unpack by shifts, and four neighbours stay neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
# Of one group: 16 of pairs, 2 of its scale.
GROUP_BYTES = 18
_TINY = torch.finfo(torch.float32).tiny
# Elements that are quantised at once, for their quotients are float32.
_AT_ONCE = 1 << 22


def part_bytes(hidden_size: int) -> int:
    """Bytes of one part of a row. `hidden_size` must be a multiple of `GROUP`."""
    return hidden_size // GROUP * GROUP_BYTES


def width(size: int) -> int:
    """D of a part of `size` bytes."""
    return size // GROUP_BYTES * GROUP


def _scales(groups: Tensor) -> Tensor:
    """`[..., 1]` float32, of values `[..., GROUP]`; 1 for a group of zeros."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = ((largest.float() / -8).view(torch.int32) & -65536).view(torch.float32)
    return torch.where(scales.abs() < _TINY, 1.0, scales)  # below, a scale has too few bits


def _pack_some(weights: Tensor) -> Tensor:
    groups = weights.unflatten(-1, (-1, GROUP))
    scales = _scales(groups)
    integers = (groups / scales).round_().clamp_(-8, 7).to(torch.int8).view(torch.uint8) & 15
    low, high = integers.unflatten(-1, (4, 2, 4)).unbind(-2)  # byte, half, word
    pairs = (low | high << 4).transpose(-1, -2).flatten(-3)
    return torch.cat([pairs, scales[..., 0].to(torch.bfloat16).view(torch.uint8)], dim=-1)


def pack(weights: Tensor) -> Tensor:
    """Round to the nearest integers.

    Args:
        weights: `[F, D]`, finite; D a multiple of `GROUP`.

    Returns:
        `[F, part_bytes(D)]` uint8.
    """
    f, d = weights.shape
    out = torch.empty(f, part_bytes(d), dtype=torch.uint8, device=weights.device)
    if out.numel():
        step = max(1, _AT_ONCE // d)
        for rows, packed in zip(weights.split(step), out.split(step), strict=True):
            packed.copy_(_pack_some(rows))
    return out


def unpack(rows: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """The weights of whole rows; each is exact in float32, and rounded once to a narrower dtype.

    Args:
        rows: `[F, P*part_bytes(D)]` uint8.
        parts: P.
        dtype: of the result.

    Returns:
        `[F, P*D]`.
    """
    split = rows.unflatten(1, (parts, rows.shape[1] // parts))
    d = width(split.shape[2])
    pairs = split[..., : d // 2].unflatten(-1, (d // GROUP, 4, 4)).view(torch.int8)  # group, word, byte
    values = torch.stack((pairs << 4 >> 4, pairs >> 4), dim=-1).movedim(-3, -1).flatten(-3)
    scales = split[..., d // 2 :].contiguous().view(torch.bfloat16)
    exact = torch.promote_types(dtype, torch.float32)
    return values.to(exact).mul_(scales[..., None].to(exact)).to(dtype).flatten(1)
