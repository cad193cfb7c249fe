"""The backend table. A backend is one file here and one line in `TABLE`, with the members of `Backend`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ...base.experts import Experts
from ...base.record import Record

TABLE: tuple[str, ...] = ("torch_eager", "cpu", "triton", "cuda", "cublas")

# How a backend runs a problem, where it has more than one way: JSON values only, so that it can be printed and stored.
Config = Mapping[str, int | str | bool]


@dataclass(frozen=True)
class Problem:
    """What a backend must be able to compute.

    Attributes:
        device: device type, `cpu` or `cuda`.
        dtype: of x and of the biases.
        tokens: M.
        hidden_size: D.
        intermediate_size: F, rows of the record.
        kept: K, neurons used; equals F unless `gather`.
        gated, gather: the form.
        activation: a key of `ACTIVATIONS`.
        weights: dtype of the record; None for that of x.
        batch_invariant: a row of the result must not depend, to the bit, on the rows beside it.
        experts, picked: of a mixture, E and to how many of them a token goes; each is such an FFN. 0: no mixture.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    hidden_size: int
    intermediate_size: int
    kept: int
    gated: bool
    gather: bool
    activation: str
    weights: torch.dtype | None = None
    batch_invariant: bool = False
    experts: int = 0
    picked: int = 0

    @classmethod
    def of(cls, record: Record, dtype: torch.dtype, tokens: int, batch_invariant: bool = False) -> Problem:
        """That of a record and so many tokens of `dtype`, on the record's device."""
        rows = record.rows
        return cls(
            rows.device.type,
            dtype,
            tokens,
            record.hidden_size,
            record.neurons,
            record.kept,
            record.gated,
            record.index is not None,
            record.activation,
            rows.dtype,
            batch_invariant,
        )

    @classmethod
    def of_experts(cls, experts: Experts, dtype: torch.dtype, picked: int, tokens: int, device: str) -> Problem:
        """That of a mixture's experts, each token of which goes to `picked` of them."""
        rows = experts.rows
        sizes = (tokens, experts.hidden_size, experts.neurons, experts.most)
        form = (experts.gated, experts.index is not None, experts.activation, rows.dtype)
        return cls(device, dtype, *sizes, *form, experts=len(rows), picked=picked)


class Backend(Protocol):
    NAME: str

    def why_not(self, problem: Problem) -> str | None:
        """One line when it cannot run the problem, else None."""

    def default_config(self, problem: Problem) -> Config:
        """What it takes, without having measured, for a problem it can run; empty where there is nothing to choose."""

    def candidate_configs(self, problem: Problem) -> list[Config]:
        """What `pyprune tune` times for a problem it can run, the default first; may be empty."""

    def run(self, x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
        """The FFN of `x` `[M, D]`, by `config` (one of this backend's), or by the default."""


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_ON: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.uint8,), "cuda": ()}  # int4


def no_native_kernel(problem: Problem) -> str | None:
    """Why neither native library has a kernel for the dtypes of `problem`, in one line, or None."""
    if problem.dtype not in NATIVE_DTYPES:
        return f"no kernel for {problem.dtype}"
    if problem.weights not in (None, *NATIVE_DTYPES, torch.int8, *_NATIVE_ON[problem.device]):
        return f"no kernel for {'int4' if problem.weights == torch.uint8 else problem.weights} weights"
    return None


def row_by_row(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` for each row of x `[M, D]` alone, so that no row sees another: the same kernels, from fresh memory."""
    # Where memory starts can change the order of sums too.
    outs = [run(x[m : m + 1].clone()) for m in range(x.shape[0])]
    return torch.cat(outs) if outs else torch.empty_like(x)


def load_all() -> dict[str, Backend]:
    """Every backend of the table, by name."""
    modules = [cast(Backend, importlib.import_module(f"{__name__}.{module}")) for module in TABLE]
    return {module.NAME: module for module in modules}
