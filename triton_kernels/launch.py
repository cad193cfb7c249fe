"""A call as the launchers see it, and one launch as data: the same plan is run, or compiled without a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Config
from .defaults import decode_config, default_config, prefill_config
from .hardware import INTERPRETER


class Launch(NamedTuple):
    """One kernel launch.

    Args:
        kernel: the Triton function.
        grid: number of programs.
        arguments: every argument by name.
        num_warps, num_stages: warps of a program and depth of its load pipeline.
    """

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Compiler options. Fusion of a product and a sum into one rounding is asked for: its default differs."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options())


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `tensor` current, on which Triton launches, where it is not."""
    elsewhere = tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


class Operands(NamedTuple):
    """Those of one FFN call. The launchers need `x` as `[M, D]`, and contiguous rows everywhere.

    Args:
        x: `[M, D]`.
        record: `[F, P*D]`.
        gated: P is 3.
        activation: one of `ACTIVATIONS`.
        neuron_bias: `[F, P-1]` or None.
        down_bias: `[D]` or None.
        index: `[K]` int32 or None.
        scales: `[F, P]` float32 with an int8 record, else None.
        bf16_bits: the tensors hold bfloat16 values in float32, see `round_like`.
        architecture: where it runs, see `hardware`.
    """

    x: Tensor
    record: Tensor
    gated: bool
    activation: str
    neuron_bias: Tensor | None = None
    down_bias: Tensor | None = None
    index: Tensor | None = None
    scales: Tensor | None = None
    bf16_bits: bool = False
    architecture: int = INTERPRETER

    @property
    def m(self) -> int:
        """Number of tokens."""
        return self.x.shape[0]

    @property
    def d(self) -> int:
        """hidden_size."""
        return self.x.shape[1]

    @property
    def k(self) -> int:
        """Number of kept neurons."""
        return self.record.shape[0] if self.index is None else self.index.shape[0]

    @property
    def aligned(self) -> bool:
        """Record parts begin on 16-byte boundaries, in multiples of 16 elements: Triton then reads 16 bytes at once."""
        strides_fit = self.d % 16 == 0 and self.record.stride(0) % 16 == 0
        return strides_fit and self.record.data_ptr() % 16 == 0

    def default_config(self, kind: str | None = None, batch_invariant: bool = False) -> Config:
        """The analytic configuration, of `kind` "decode" or "prefill" if given; see `config.default_config`."""
        sizes = (self.k, self.d, self.x.dtype, self.gated)
        gather, int8 = self.index is not None, self.scales is not None
        if kind == "decode":
            return decode_config(self.m, *sizes, self.aligned, int8)
        if kind == "prefill":
            return prefill_config(self.m, *sizes, gather, self.aligned, batch_invariant, int8, self.architecture)
        return default_config(self.m, *sizes, gather, self.aligned, batch_invariant, int8, self.architecture)

    def weights(self) -> dict[str, Any]:
        """Arguments of the kernels that compute hidden activations."""
        return {
            "x": self.x,
            "x_stride": self.x.stride(0),
            "record": self.record,
            "record_stride": self.record.stride(0),
            "scales": self.scales,
            "scales_stride": 0 if self.scales is None else self.scales.stride(0),
            "neuron_bias": self.neuron_bias,
            "bias_stride": 0 if self.neuron_bias is None else self.neuron_bias.stride(0),
            "index": self.index,
            "M": self.m,
            "K": self.k,
            "D": self.d,
            "GATED": self.gated,
            "ACTIVATION": self.activation,
            "BF16_BITS": self.bf16_bits,
        }

    def epilogue(self, out: Tensor) -> dict[str, Any]:
        """Arguments of the kernels that write `out` `[M, D]`."""
        return {
            "down_bias": self.down_bias,
            "out": out,
        }

    def tokens(self, start: int, stop: int) -> Operands:
        """Those of tokens `start` to `stop`."""
        return self._replace(x=self.x[start:stop])
