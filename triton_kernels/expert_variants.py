"""Experts to compile without a GPU: every branch, dtype and kind of tile, and what is offered for timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import PrefillConfig
from .experts import ExpertOperands, launches
from .experts_config import experts_candidates
from .launch import Launch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExpertVariant:
    """One call of experts to compile for.

    Args:
        tokens, picked, experts, f, d: T, K, E, neurons of an expert, channels.
        dtype: a key of `DTYPES`, of x.
        gated, activation: see `experts.moe`.
        int8: the rows are int8.
        narrow: index is int32, not int64, and the router's weights are float32, not of x's dtype.
        gather: rows are found by an index.
        config: None for the analytic one.
        architecture: for which the launches are planned.
    """

    tokens: int
    picked: int
    experts: int
    f: int
    d: int
    dtype: str
    gated: bool = True
    activation: str = "silu"
    int8: bool = False
    narrow: bool = False
    gather: bool = False
    config: PrefillConfig | None = None
    architecture: int = 90
    extras: bool = False

    def operands(self) -> ExpertOperands:
        """Meta tensors."""
        parts, dtype = 3 if self.gated else 2, DTYPES[self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        routing = (self.tokens, self.picked)
        return ExpertOperands(
            x=empty(self.tokens, self.d),
            rows=empty(self.experts, self.f, parts * self.d, dtype=torch.int8 if self.int8 else dtype),
            gated=self.gated,
            activation=self.activation,
            index=empty(*routing, dtype=torch.int32 if self.narrow else torch.int64),
            weights=empty(*routing, dtype=torch.float32 if self.narrow else dtype),
            scales=empty(self.experts, self.f, parts, dtype=torch.float32) if self.int8 else None,
            kept=empty(self.experts, self.f, dtype=torch.int32) if self.gather else None,
            counts=empty(self.experts, dtype=torch.int32) if self.gather else None,
            architecture=self.architecture,
        )

    def launches(self) -> list[Launch]:
        """What the launcher would do."""
        p = self.operands()
        out = torch.empty((self.tokens, self.d), dtype=p.x.dtype, device="meta")
        return launches(p, out, self.config or p.default_config(), exact=self.tokens <= 64)

    def candidates(self) -> list[ExpertVariant]:
        """This call with every configuration that is offered for it."""
        sizes = (self.tokens, self.picked, self.experts, self.f, self.d, DTYPES[self.dtype], self.gated)
        found = experts_candidates(*sizes, self.operands().aligned, self.architecture, self.gather)
        return [replace(self, config=config) for config in found]


_OLMOE = ExpertVariant(1, 8, 64, 1024, 2048, "bfloat16")
_QWEN3 = ExpertVariant(1, 8, 128, 768, 2048, "bfloat16")


def expert_variants() -> Iterator[ExpertVariant]:
    """Every branch, dtype and kind of tile at least once."""
    for tokens in (1, 4, 256, 4096):
        yield replace(_OLMOE, tokens=tokens)
        yield replace(_OLMOE, tokens=tokens, gather=True)
    for tokens in (1, 256):
        for keep in (1, 2):
            yield replace(_QWEN3, tokens=tokens, f=_QWEN3.f // keep)
    for tokens in (1, 16, 512):
        small = ExpertVariant(tokens, 2, 8, 1536, 576, "float16", False, "gelu_tanh", narrow=True)
        yield small
        yield replace(small, dtype="float32", activation="gelu", gated=True)
        yield replace(small, dtype="bfloat16", f=1535, d=577, gated=True, activation="quick_gelu")
        yield replace(_OLMOE, tokens=tokens, int8=True)
        yield replace(small, gather=True)
    yield ExpertVariant(16, 2, 8, 1536, 576, "float32", int8=True, narrow=True)
    yield ExpertVariant(16, 2, 8, 1536, 576, "float16", int8=True, gather=True)
    # Sizes and strides of 1, which Triton makes constants.
    yield ExpertVariant(1, 1, 1, 1, 1, "float16", activation="relu2")
    yield ExpertVariant(3, 1, 1, 1, 1, "float16", activation="relu2")


def expert_offered(architecture: int) -> Iterator[ExpertVariant]:
    """Every configuration that is offered on sm_`architecture` for the two mixtures that are measured."""
    for base in (_OLMOE, _QWEN3):
        for tokens in (1, 4, 16, 256, 4096):
            for keep in (1, 2):
                yield from replace(base, tokens=tokens, f=base.f // keep, architecture=architecture).candidates()
