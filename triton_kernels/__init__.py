"""Fused pruned FFNs in Triton: `ffn(x, record, ...)` equals `reference.ffn`, `moe(x, rows, ...)` `reference.moe`.

Imports torch, triton and siblings only. With TRITON_INTERPRET=1 set before the first import of triton, everything
runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import decode, descriptors, prefill
from .activations import ACTIVATIONS
from .candidates import candidates
from .checks import INTERPRETED, check_operands, require, require_device, why_no_int8, why_unavailable
from .config import Config, DecodeConfig, PrefillConfig, TileConfig, from_json, to_json
from .defaults import DECODE_MAX_TOKENS, MAX_TOKENS, decode_config, default_config, prefill_config
from .elementwise import act_mul
from .experts import moe
from .experts_config import experts_candidates, experts_config
from .hardware import architecture
from .launch import Operands, device_of

__all__ = [
    "ACTIVATIONS",
    "DECODE_MAX_TOKENS",
    "INTERPRETED",
    "Config",
    "DecodeConfig",
    "PrefillConfig",
    "TileConfig",
    "act_mul",
    "architecture",
    "candidates",
    "decode_config",
    "default_config",
    "experts_candidates",
    "experts_config",
    "ffn",
    "from_json",
    "moe",
    "prefill_config",
    "to_json",
    "why_no_int8",
    "why_unavailable",
]


def _contiguous_rows(matrix: Tensor | None, columns: int) -> Tensor | None:
    """`[..., columns]` as `[rows, columns]` with contiguous rows, without a copy where the strides allow it."""
    if matrix is None:
        return None
    flat = matrix.reshape(-1, columns)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _run(p: Operands, out: Tensor, config: Config) -> None:
    if isinstance(config, PrefillConfig) and p.k == 0:
        # Without neurons the decode plan is its epilogue alone.
        config = p.default_config()
    launches = decode.launches if isinstance(config, DecodeConfig) else prefill.launches
    partials = isinstance(config, DecodeConfig) or config.splits > 1
    step = MAX_TOKENS if partials else p.m
    for start in range(0, p.m, step):
        stop = min(start + step, p.m)
        for launch in launches(p.tokens(start, stop), out[start:stop], config):
            launch.run()


def ffn(
    x: Tensor,
    record: Tensor,
    *,
    gated: bool,
    activation: str,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    index: Tensor | None = None,
    scales: Tensor | None = None,
    config: Config | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`down(act(up(x)))`, gated `down(act(gate(x)) * up(x))`, over the kept neurons.

    Nothing waits for the device, and what is allocated depends on shapes alone. Two calls give the same bits.

    Args:
        x: `[..., D]` float32, float16 or bfloat16, any strides.
        record: `[F, P*D]` in x's dtype or int8, rows `[up | down]` or `[gate | up | down]`, contiguous along a row.
        gated: P is 3, not 2.
        activation: one of `ACTIVATIONS`.
        neuron_bias: `[F, P-1]` or None.
        down_bias: `[D]` or None.
        index: `[K]` int32 rows of `record` to use, each in `0..F-1`, or None for all of them.
        scales: `[F, P]` float32 with an int8 record, else None.
        config: None chooses analytically: a single pass, in which a row depends on nothing beside it, to the bit, or
            two matrix products; see `default_config`.
        batch_invariant: without `config`, choose such that a row has the same bits whatever the rows beside it.

    Returns:
        `[..., D]` in the dtype of `x`, accumulated in float32, contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or name breaks the rules above, `config` cannot run the call, or the
            device cannot run Triton.
    """
    p = Operands(x, record, gated, activation, neuron_bias, down_bias, index, scales)
    check_operands(p)
    d = x.shape[-1]
    require_device(x, "x")
    if INTERPRETED and x.dtype == torch.bfloat16:
        wide: dict[str, Any] = {
            name: value.float()
            for name, value in p._asdict().items()
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16
        }
        p = p._replace(**wide, bf16_bits=True)
    p = p._replace(
        x=_contiguous_rows(p.x, d),
        neuron_bias=_contiguous_rows(p.neuron_bias, 2 if gated else 1),
        scales=_contiguous_rows(p.scales, 3 if gated else 2),
        down_bias=None if p.down_bias is None else p.down_bias.contiguous(),
        index=None if index is None else index.contiguous(),
        architecture=architecture(x.device),
    )
    if config is None:
        config = p.default_config(batch_invariant=batch_invariant)
    elif isinstance(config, PrefillConfig) and config.descriptors:
        reason = descriptors.why_not(p)
        require(reason is None, "config", f"have descriptors false: {reason}", True)
    out = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    if p.m:
        with device_of(x):
            _run(p, out, config)
    return out.view(x.shape).to(x.dtype)
