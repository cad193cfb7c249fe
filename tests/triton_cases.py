"""What the tests of the Triton kernels share: both kinds of configuration, and the plain-torch twin of their arguments.

To be imported after TRITON_INTERPRET is set.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyprune import triton_kernels as kernels
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.triton_kernels.launch import Operands


def by_kind(kind: str, x: Tensor, record: Tensor, **arguments: Any) -> Tensor:
    """`ffn` by the analytic configuration of `kind`, whatever the number of tokens."""
    operands = Operands(x.reshape(-1, x.shape[-1]), record, **arguments, architecture=kernels.architecture(x.device))
    return kernels.ffn(x, record, **arguments, config=operands.default_config(kind))


PATHS = {kind: functools.partial(by_kind, kind) for kind in ("decode", "prefill")}


def twin(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """`ffn` in plain torch with every floating tensor in `dtype`; scales, which are float32, only in float64."""
    cast = {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and (name != "scales" or dtype == torch.float64)
        else value
        for name, value in arguments.items()
    }
    x, rows = cast.pop("x"), cast.pop("record")
    return reference.ffn(x, Record.unchecked(rows, **cast))
