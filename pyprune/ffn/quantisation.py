"""Records in another dtype than their model's: int8 with one scale per neuron and part, int4 in groups (as `base.int4`
has it), and plain casts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import int4
from ..base.errors import check
from ..base.record import Record

# What the weights of a record can be kept in, by the names that users give.
WEIGHTS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,  # two in a byte
}
_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny


def name_of(dtype: torch.dtype) -> str:
    """What users call a record's dtype."""
    return "int4" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


def check_width(hidden_size: int, dtype: torch.dtype | None) -> None:
    """Raise `InputError` unless records of `dtype` can have this D: int4 needs whole groups."""
    if dtype == torch.uint8:
        rule = f"be a multiple of {int4.GROUP} for int4 weights"
        check(hidden_size % int4.GROUP == 0, "hidden_size", rule, hidden_size)


def row_bytes(parts: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of one row of a record."""
    return parts * (int4.part_bytes(hidden_size) if dtype == torch.uint8 else hidden_size * dtype.itemsize)


def check_fits(weights: Tensor, dtype: torch.dtype, argument: str) -> None:
    """Raise `InputError` naming `argument` unless all of `weights` are finite in `dtype` (int8, int4: in scales)."""
    if weights.numel() == 0:
        return
    target = dtype if dtype.is_floating_point else torch.float32
    low, high = weights.aminmax()  # NaN if there is one
    check(
        bool(torch.stack((low, high)).to(target).isfinite().all()),
        argument,
        f"be finite in {target}",
        (low.item(), high.item()),
    )


def channel_scales(down: Tensor, group: Any = None) -> Tensor:
    """What the columns of down rows are divided by before they are rounded, and the FFN's result is multiplied by.

    A row has one scale (int4: one in 32 elements), and in many models some channels of the residual stream are written
    with far larger weights than the rest, by all neurons; beside those the rest would be rounded coarsely. Equalising
    channels is old (Nagel et al. 2019, arXiv 1906.04721, section 4.1); here by powers of two, with which nothing is
    rounded, as long as it is neither too large nor too small for its dtype.

    Args:
        down: `[F, D]`, or `[E, F, D]` of experts, whose results are added up; of all neurons, so that which of them
            are kept changes nothing.
        group: of processes, each with some of the neurons; None for all here.

    Returns:
        `[D]` in the dtype of `down`, powers of two from 1 to 2^12, by the root mean square of each column.
    """
    size = torch.zeros(down.shape[-1], device=down.device)
    for one in down.unsqueeze(0) if down.dim() == 2 else down:  # experts one by one, for the squares are float32
        size += one.float().square().sum(0)
    if group is not None:
        dist.all_reduce(size, group=group)
    steps = (size / size.median()).log2().div(2).round().nan_to_num(0.0, 0.0, 0.0).clamp(-4, 8)
    return (steps - steps.min()).exp2().to(down.dtype)


def quantise(record: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """`record = q * scale` with `scale = max |part| / 127`, rounded to the nearest.

    A float32 record that was dequantised gives the same integers and scales again.

    Args:
        record: `[F, P*D]`, floating point.
        parts: P.

    Returns:
        `[F, P*D]` int8 in [-127, 127], and scales `[F, P]` float32; the scale of a part of zeros is 1.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    check_fits(record, torch.int8, "record")
    split = record.unflatten(1, (parts, record.shape[1] // parts))
    low, high = split.aminmax(dim=-1)
    scales = torch.maximum(-low, high).float() / _LARGEST
    scales = torch.where(scales < _TINY, 1.0, scales)  # below, float32 has too few bits for a scale
    out = torch.empty_like(split, dtype=torch.int8, memory_format=torch.contiguous_format)
    for i in range(parts):  # one part at a time, for the quotients are float32
        out[:, i] = (split[:, i] / scales[:, i, None]).round_()
    return out.flatten(1), scales


def dequantise(record: Tensor, scales: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor:
    """The weights of a record, `[F, P*D]`.

    Args:
        record: its rows.
        scales: `[F, P]` float32 with int8 rows, else None.
        parts: P.
        dtype: of the result; a product is rounded once.
    """
    if record.dtype == torch.uint8:
        return int4.unpack(record, parts, dtype)
    if scales is None:
        return record.to(dtype)
    f = len(record)
    split = record.view(f, parts, record.shape[1] // parts).to(torch.promote_types(dtype, torch.float32))
    return split.mul_(scales[..., None]).to(dtype).view(record.shape)


def widened(record: Record, dtype: torch.dtype = torch.float64) -> Record:
    """The same FFN with everything in `dtype`, int8 and int4 rows written out."""
    neuron_bias, down_bias = (None if t is None else t.to(dtype) for t in (record.neuron_bias, record.down_bias))
    rows = dequantise(record.rows, record.scales, record.parts, dtype)
    return Record(rows, record.gated, record.activation, None, neuron_bias, down_bias, record.index)


def cast(record: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`record` (`[F, P*D]`) in `dtype`, and scales `[F, P]` if that is int8; int4 as `int4.pack` has it, part by part.

    Raises:
        InputError: a weight is not finite in `dtype`, or D is no multiple of 32 for int4.
    """
    check_width(record.shape[1] // parts, dtype)
    if dtype == torch.int8:
        return quantise(record, parts)
    check_fits(record, dtype, "record")
    if dtype == torch.uint8:
        return torch.cat([int4.pack(part) for part in record.chunk(parts, dim=1)], dim=1), None
    return record.to(dtype), None
