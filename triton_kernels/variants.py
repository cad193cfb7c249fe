"""Problems to compile without a GPU: every branch, dtype and kind of tile, and every configuration that is offered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import decode, elementwise, prefill
from .candidates import candidates
from .config import Config, DecodeConfig
from .defaults import prefill_config
from .expert_variants import DTYPES, ExpertVariant, expert_offered, expert_variants
from .launch import Launch, Operands


@dataclass(frozen=True)
class Variant:
    """One FFN to compile for.

    Args:
        m, k, d: tokens, kept neurons, channels. They choose blocks, and whether addresses are aligned.
        dtype: "float32", "float16" or "bfloat16".
        gated, gather, activation: see `ffn`.
        phase: "decode", "prefill", or "act_mul" over `[m, k]`.
        int8: the record is int8.
        extras: with biases.
        config: None for the analytic one of `phase`.
        architecture: for which the launches are planned.
    """

    m: int
    k: int
    d: int
    dtype: str
    gated: bool
    gather: bool
    activation: str
    phase: str
    int8: bool = False
    extras: bool = True
    config: Config | None = None
    architecture: int = 90

    def operands(self) -> Operands:
        """Meta tensors."""
        parts = 3 if self.gated else 2
        dtype = DTYPES[self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return Operands(
            x=empty(self.m, self.d),
            record=empty(self.k, parts * self.d, dtype=torch.int8 if self.int8 else dtype),
            gated=self.gated,
            activation=self.activation,
            neuron_bias=empty(self.k, parts - 1) if self.extras else None,
            down_bias=empty(self.d) if self.extras else None,
            index=empty(self.k, dtype=torch.int32) if self.gather else None,
            scales=empty(self.k, parts, dtype=torch.float32) if self.int8 else None,
            architecture=self.architecture,
        )

    def launches(self) -> list[Launch]:
        """What the launchers would do."""
        p = self.operands()
        if self.phase == "act_mul":
            gate = torch.empty((self.m, self.k), dtype=p.x.dtype, device="meta")
            return [elementwise.launch(gate, gate if self.gated else None, gate, self.activation)]
        config = self.config or p.default_config(self.phase)
        out = torch.empty((self.m, self.d), dtype=p.x.dtype, device="meta")
        if isinstance(config, DecodeConfig):
            return decode.launches(p, out, config)
        return prefill.launches(p, out, config)

    def candidates(self) -> list[Variant]:
        """This problem with every configuration that the kernels offer for it."""
        offered = candidates(
            self.m, self.k, self.d, DTYPES[self.dtype], self.gated, self.gather,
            self.operands().aligned, int8=self.int8, architecture=self.architecture,
        )  # fmt: skip
        return [replace(self, config=config) for config in offered]


def variants(architecture: int) -> Iterator[Variant | ExpertVariant]:
    """Every branch, dtype and kind of tile at least once, for sm_`architecture`."""
    yield from (replace(variant, architecture=architecture) for variant in _variants())
    yield from (replace(variant, architecture=architecture) for variant in expert_variants())


def _variants() -> Iterator[Variant]:
    for phase, m in (("decode", 1), ("prefill", 512)):
        for gated, activation in ((False, "gelu"), (True, "silu")):
            for gather in (False, True):
                yield Variant(m, 14336, 4096, "bfloat16", gated, gather, activation, phase)
        yield Variant(m, 1536, 576, "float16", True, True, "gelu_tanh", phase)
        yield Variant(m, 1536, 576, "float32", True, True, "gelu", phase)
        yield Variant(m, 14335, 4097, "bfloat16", True, True, "quick_gelu", phase)
        yield Variant(m, 14336, 4096, "bfloat16", True, True, "silu", phase, int8=True)
        yield Variant(m, 14336, 4096, "float16", False, False, "relu", phase, int8=True)
        yield Variant(m, 1536, 576, "float32", True, False, "gelu", phase, int8=True)
    yield Variant(1, 14336, 4096, "bfloat16", True, False, "silu", "decode", extras=False)
    yield Variant(1, 3072, 768, "float16", False, False, "gelu_tanh", "decode", extras=False)
    # Few tokens and more, in each slab: a row must be made of the same instructions.
    for m, k in itertools.product((1, 16, 64), (14336, 7168, 3584)):
        yield Variant(m, k, 4096, "bfloat16", True, True, "silu", "decode")
    yield Variant(16, 14336, 4096, "bfloat16", True, True, "silu", "prefill")
    yield Variant(64, 14336, 4096, "bfloat16", True, True, "silu", "prefill")
    # Few tokens: every width of both products, from full layers and narrow ones.
    for m, k, gated in itertools.product((16, 64), (7168, 3584), (False, True)):
        yield Variant(m, k, 4096, "bfloat16", gated, False, "silu", "prefill", extras=False)
    yield Variant(64, 14335, 4097, "float16", True, True, "silu", "decode")
    yield Variant(33, 3072, 768, "float16", False, True, "relu2", "prefill")
    yield Variant(17, 587, 587, "float16", False, False, "relu", "prefill")
    for m, k, d, dtype, gated in ((512, 14336, 4096, "bfloat16", True), (33, 3072, 768, "float16", False)):
        tiles = prefill_config(m, k, d, DTYPES[dtype], gated, False, True)
        described = replace(tiles, descriptors=True)
        yield Variant(m, k, d, dtype, gated, False, "silu", "prefill", config=described)
    # Sizes and strides of 1, which Triton makes constants.
    yield Variant(1, 1, 1, "float16", True, True, "relu2", "decode")
    yield Variant(1, 1, 1, "float16", True, True, "relu2", "prefill")
    for gated, dtype, k in ((True, "bfloat16", 14336), (False, "float16", 3072), (True, "float32", 577)):
        yield Variant(512, k, 16, dtype, gated, False, "gelu_tanh", "act_mul")


def offered(architecture: int) -> Iterator[Variant | ExpertVariant]:
    """Every configuration that is offered on sm_`architecture`, for wide layers: the hardest on registers."""
    yield from (replace(variant, architecture=architecture) for variant in expert_offered(architecture))
    forms = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
    for m in (1, 16, 64, 4096):
        for gated, gather, int8 in forms:
            base = Variant(
                m, 14336, 4096, "bfloat16", gated, gather, "silu", "prefill", int8, architecture=architecture
            )
            yield from base.candidates()
