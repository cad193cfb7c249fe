"""What the kernels need to be true of their arguments, as errors that name argument, rule and value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS
from .launch import Operands

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# triton.jit chose between compiler and interpreter when the kernels were defined. The interpreter computes bfloat16
# wrongly: there the launchers widen it to float32, which holds every value, and the kernels round by bits.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Triton's own functions chose when triton was imported.
_INTERPRETED_TOO_LATE = INTERPRETED and isinstance(tl.zeros, triton.JITFunction)
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


def why_no_int8(dtype: torch.dtype, device_type: str) -> str | None:
    """None if int8 records are computed beside x of `dtype` on the current device, else the reason in one line."""
    if dtype != torch.float32 or INTERPRETED or device_type != "cuda":
        return None
    # Before 3.9 (the first found to be right; 3.6 is wrong) Triton rounds such products to TF32 there, unasked.
    old = tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 9)
    if old and torch.cuda.get_device_capability() >= (10, 0):
        return "int8 records beside float32 need Triton 3.9 or newer on compute capability 10.0 and newer"
    return None


def require(condition: bool, argument: str, rule: str, value: object) -> None:
    """Raise `ValueError` naming argument, rule and value unless `condition`."""
    if not condition:
        raise ValueError(f"{argument} must {rule}; got {value}")


def require_device(tensor: Tensor, argument: str) -> None:
    """Raise `ValueError` unless the kernels run where `tensor` is."""
    if tensor.device.type != "cuda" and (reason := why_unavailable(tensor.device.type)):
        raise ValueError(f"{argument} must be where the Triton kernels run; got {tensor.device}: {reason}")


def _same_device(p: Operands, tensors: dict[str, tuple[Tensor | None, torch.dtype]]) -> None:
    for name, (tensor, expected) in tensors.items():
        if tensor is not None:
            require(tensor.dtype == expected, name, f"be {expected}", tensor.dtype)
            require(tensor.device == p.x.device, name, f"be on the device of x, {p.x.device}", tensor.device)


def check_operands(p: Operands) -> None:
    """Raise ValueError, naming argument, rule and value, for what the kernels would turn into wrong numbers.

    The values of `index` are not read: that would wait for the device. Its maker checks them once.
    """
    parts = 3 if p.gated else 2
    require(p.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", p.activation)
    require(p.x.dtype in DTYPES, "x", "be float32, float16 or bfloat16", p.x.dtype)
    require(p.x.dim() >= 1 and p.x.shape[-1] >= 1, "x", "have at least one channel", tuple(p.x.shape))
    d, shape, strides = p.x.shape[-1], tuple(p.record.shape), p.record.stride()
    require(len(shape) == 2 and shape[1] == parts * d, "record", f"have shape [F, {parts}*{d}]", shape)
    separate = shape[0] <= 1 or strides[0] >= shape[1]
    require(strides[1] == 1 and separate, "record", "have contiguous rows that do not overlap", f"strides {strides}")
    shapes = {
        "neuron_bias": (p.neuron_bias, (shape[0], parts - 1)),
        "down_bias": (p.down_bias, (d,)),
        "scales": (p.scales, (shape[0], parts)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None:
            require(tuple(tensor.shape) == expected, name, f"have shape {expected}", tuple(tensor.shape))
    if p.index is not None:
        require(p.index.dim() == 1, "index", "have shape [K]", tuple(p.index.shape))
    if p.scales is None:
        require(p.record.dtype != torch.int8, "scales", "be given with an int8 record", None)
    else:
        reason = why_no_int8(p.x.dtype, p.x.device.type)
        require(reason is None, "scales", f"be None here: {reason}", tuple(p.scales.shape))
    _same_device(
        p,
        {
            "neuron_bias": (p.neuron_bias, p.x.dtype),
            "down_bias": (p.down_bias, p.x.dtype),
            "record": (p.record, p.x.dtype if p.scales is None else torch.int8),
            "scales": (p.scales, torch.float32),
            "index": (p.index, torch.int32),
        },
    )
