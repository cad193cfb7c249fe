"""Fused pruned FFNs in Triton: `ffn(x, record, ...)` equals `reference.plain_ffn` or `gated_ffn` (and their gathers).

Imports torch, triton and siblings only. With TRITON_INTERPRET=1 set before the first import of triton, everything
runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode, prefill
from .activations import ACTIVATIONS
from .config import DECODE_MAX_TOKENS, DecodeConfig, PrefillConfig, decode_config, prefill_config
from .launch import Problem

__all__ = [
    "ACTIVATIONS",
    "DECODE_MAX_TOKENS",
    "INTERPRETED",
    "DecodeConfig",
    "PrefillConfig",
    "decode_config",
    "ffn",
    "ffn_decode",
    "ffn_prefill",
    "prefill_config",
    "why_unavailable",
]

# triton.jit chose between compiler and interpreter when the kernels above were defined.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Triton's own functions chose when triton was imported.
_INTERPRETED_TOO_LATE = INTERPRETED and isinstance(tl.zeros, triton.JITFunction)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MINIMUM_CAPABILITY = (8, 0)


def why_unavailable(device_type: str) -> str | None:
    """None if the kernels run on `device_type` ("cpu", "cuda", ...) now, else the reason in one line."""
    if _INTERPRETED_TOO_LATE:
        return "TRITON_INTERPRET was set after the first import of triton"
    if INTERPRETED:
        return None if device_type in ("cpu", "cuda") else f"Triton's interpreter does not run on {device_type}"
    if device_type != "cuda":
        return "needs a CUDA device (or TRITON_INTERPRET=1 for tests)"
    if not torch.cuda.is_available():
        return "needs a CUDA device; torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < _MINIMUM_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (_MINIMUM_CAPABILITY, capability))
        return f"needs compute capability {needed} or newer; the device has {found}"
    return None


def _require(condition: bool, argument: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must {rule}; got {value}")


def _check(p: Problem) -> None:
    """Raise ValueError, naming argument, rule and value, for what the kernels would turn into wrong numbers.

    The values of `index` are not read: that would wait for the device. Its maker checks them once.
    """
    parts = 3 if p.gated else 2
    _require(p.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", p.activation)
    _require(p.x.dtype in _DTYPES, "x", "be float32, float16 or bfloat16", p.x.dtype)
    _require(p.x.dim() >= 1 and p.x.shape[-1] >= 1, "x", "have at least one channel", tuple(p.x.shape))
    d, shape, strides = p.x.shape[-1], tuple(p.record.shape), p.record.stride()
    _require(len(shape) == 2 and shape[1] == parts * d, "record", f"have shape [F, {parts}*{d}]", shape)
    separate = shape[0] <= 1 or strides[0] >= shape[1]
    _require(strides[1] == 1 and separate, "record", "have contiguous rows that do not overlap", f"strides {strides}")
    shapes = {
        "neuron_bias": (p.neuron_bias, (shape[0], parts - 1)),
        "down_bias": (p.down_bias, (d,)),
        "residual": (p.residual, tuple(p.x.shape)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None:
            _require(tuple(tensor.shape) == expected, name, f"have shape {expected}", tuple(tensor.shape))
    if p.index is not None:
        _require(p.index.dim() == 1, "index", "have shape [K]", tuple(p.index.shape))
    dtypes = {name: (tensor, p.x.dtype) for name, (tensor, _) in shapes.items()}
    for name, (tensor, expected) in {
        **dtypes,
        "record": (p.record, p.x.dtype),
        "index": (p.index, torch.int32),
    }.items():
        if tensor is not None:
            _require(tensor.dtype == expected, name, f"be {expected}", tensor.dtype)
            _require(tensor.device == p.x.device, name, f"be on the device of x, {p.x.device}", tensor.device)


def _contiguous_rows(matrix: Tensor | None, columns: int) -> Tensor | None:
    """`[..., columns]` as `[rows, columns]` with contiguous rows, without a copy where the strides allow it."""
    if matrix is None:
        return None
    flat = matrix.reshape(-1, columns)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _run_decode(p: Problem, out: Tensor) -> None:
    config = p.decode_config()
    for start in range(0, p.m, config.max_tokens):
        stop = min(start + config.max_tokens, p.m)
        for launch in decode.launches(p.tokens(start, stop), out[start:stop], config):
            launch.run()


def _run_prefill(p: Problem, out: Tensor) -> None:
    if p.k == 0:
        # Without neurons the decode plan is its epilogue alone.
        _run_decode(p, out)
        return
    for launch in prefill.launches(p, out, p.prefill_config()):
        launch.run()


def _run(p: Problem, out: Tensor) -> None:
    (_run_decode if p.m <= DECODE_MAX_TOKENS else _run_prefill)(p, out)


def _call(run: Callable[[Problem, Tensor], None], p: Problem) -> Tensor:
    _check(p)
    x = p.x
    if x.device.type != "cuda" and (reason := why_unavailable(x.device.type)):
        raise ValueError(f"x must be where the Triton kernels run; got {x.device}: {reason}")
    if INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter computes bfloat16 wrongly. float32 holds every bfloat16 value, and the kernels round by bits.
        wide = {name: value.float() for name, value in p._asdict().items() if isinstance(value, Tensor)}
        p = p._replace(**{**wide, "index": p.index}, bf16_bits=True)
    d = x.shape[-1]
    p = p._replace(
        x=_contiguous_rows(p.x, d),
        residual=_contiguous_rows(p.residual, d),
        neuron_bias=_contiguous_rows(p.neuron_bias, 2 if p.gated else 1),
        down_bias=None if p.down_bias is None else p.down_bias.contiguous(),
        index=None if p.index is None else p.index.contiguous(),
    )
    out = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    if p.m:
        elsewhere = x.device.type == "cuda" and x.device.index != torch.cuda.current_device()
        with torch.cuda.device(x.device) if elsewhere else nullcontext():
            run(p, out)
    return out.view(x.shape).to(x.dtype)


def ffn(
    x: Tensor,
    record: Tensor,
    *,
    gated: bool,
    activation: str,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """`down(act(up(x)))`, gated `down(act(gate(x)) * up(x))`, plus `residual` if given, over the kept neurons.

    Up to `DECODE_MAX_TOKENS` tokens take `ffn_decode`, more take `ffn_prefill`. Nothing waits for the device, and what
    is allocated depends on shapes alone. Two calls give the same bits.

    Args:
        x: `[..., D]` float32, float16 or bfloat16, any strides.
        record: `[F, P*D]` in x's dtype, rows `[up | down]` or `[gate | up | down]`, contiguous along a row.
        gated: P is 3, not 2.
        activation: one of `ACTIVATIONS`.
        neuron_bias: `[F, P-1]` or None.
        down_bias: `[D]` or None.
        residual: same shape as `x`, or None.
        index: `[K]` int32 rows of `record` to use, each in `0..F-1`, or None for all of them.

    Returns:
        `[..., D]` in the dtype of `x`, accumulated in float32, contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or name breaks the rules above, or the device cannot run Triton.
    """
    return _call(_run, Problem(x, record, gated, activation, neuron_bias, down_bias, residual, index))


def ffn_decode(
    x: Tensor,
    record: Tensor,
    *,
    gated: bool,
    activation: str,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """`ffn` by the single-pass kernel for few tokens, whatever their number.

    A row of the result does not depend on the rows beside it, nor on how many there are, to the bit.
    """
    return _call(_run_decode, Problem(x, record, gated, activation, neuron_bias, down_bias, residual, index))


def ffn_prefill(
    x: Tensor,
    record: Tensor,
    *,
    gated: bool,
    activation: str,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """`ffn` by the two matrix products for many tokens, whatever their number."""
    return _call(_run_prefill, Problem(x, record, gated, activation, neuron_bias, down_bias, residual, index))
