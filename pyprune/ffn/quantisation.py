"""Records in another dtype than their model's: symmetric int8 with one scale per neuron and part, and plain casts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import check
from ..base.record import Record

# What the weights of a record can be kept in, by the names that users give.
WEIGHTS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny


def check_fits(weights: Tensor, dtype: torch.dtype, argument: str) -> None:
    """Raise `InputError` naming `argument` unless all of `weights` are finite in `dtype` (int8: in its scales)."""
    target = torch.float32 if dtype == torch.int8 else dtype
    low, high = weights.aminmax()  # NaN if there is one
    check(
        bool(torch.stack((low, high)).to(target).isfinite().all()),
        argument,
        f"be finite in {target}",
        (low.item(), high.item()),
    )


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


def dequantise(record: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of an int8 record.

    Args:
        record: `[F, P*D]` int8.
        scales: `[F, P]` float32.
        dtype: of the result; the product is rounded once.
    """
    f, parts = scales.shape
    split = record.view(f, parts, record.shape[1] // parts).to(torch.promote_types(dtype, torch.float32))
    return split.mul_(scales[..., None]).to(dtype).view(record.shape)


def widened(record: Record, dtype: torch.dtype = torch.float64) -> Record:
    """The same FFN with everything in `dtype`, int8 rows written out."""
    rows, scales = record.rows, record.scales
    neuron_bias, down_bias = (None if t is None else t.to(dtype) for t in (record.neuron_bias, record.down_bias))
    rows = rows.to(dtype) if scales is None else dequantise(rows, scales, dtype)
    return Record(rows, record.gated, record.activation, None, neuron_bias, down_bias, record.index)


def cast(record: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`record` (`[F, P*D]`) in `dtype`, and scales `[F, P]` if that is int8.

    Raises:
        InputError: a weight is not finite in `dtype`.
    """
    if dtype == torch.int8:
        return quantise(record, parts)
    check_fits(record, dtype, "record")
    return record.to(dtype), None
