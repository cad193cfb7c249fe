"""The backend table. A backend is one file here and one line in `TABLE`, with the members of `Backend`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

TABLE: tuple[str, ...] = ("torch_eager", "cpu", "triton", "cuda", "cublas")

# How a backend runs a problem, where it has more than one way: JSON values only, so that it can be printed and stored.
Config = Mapping[str, int | str | bool]


@dataclass(frozen=True)
class Problem:
    """What a backend must be able to compute.

    Attributes:
        device: device type, `cpu` or `cuda`.
        dtype: of x, biases and residual.
        tokens: M.
        hidden_size: D.
        intermediate_size: F, rows of the record.
        kept: K, neurons used; equals F unless `gather`. With `contextual` the most that a token can use.
        gated, gather: the form.
        activation: a key of `reference.ACTIVATIONS`.
        weights: dtype of the record; None for that of x.
        contextual: how many neurons of the index are used is a number on the device; implies `gather`.
        batch_invariant: a row of the result must not depend, to the bit, on the rows beside it.
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
    contextual: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True)
class Call:
    """One call of an FFN operator; layouts as in `reference`.

    Attributes:
        x: `[M, D]`.
        record: `[F, P*D]`.
        index: int32 `[K]`, or `[M, K]` with one list a token (see `count`), or None.
        scales: `[F, P]` float32 with an int8 record, else None.
        neuron_bias: `[F, P-1]` or None.
        down_bias: `[D]` or None.
        residual: `[M, D]` or None.
        gated: P = 3 if true, else 2.
        activation: a key of `reference.ACTIVATIONS`.
        count: None, or how many entries of `index` are used: int32 `[1]` with index `[K]`, int32 `[M]` with `[M, K]`;
            on the device of x, and read there only. Entries behind it may hold anything.
        batch_invariant: as in `Problem`.
    """

    x: Tensor
    record: Tensor
    index: Tensor | None
    scales: Tensor | None
    neuron_bias: Tensor | None
    down_bias: Tensor | None
    residual: Tensor | None
    gated: bool
    activation: str
    count: Tensor | None = None
    batch_invariant: bool = False


class Backend(Protocol):
    NAME: str

    def why_not(self, problem: Problem) -> str | None:
        """One line when it cannot run the problem, else None."""

    def default_config(self, problem: Problem) -> Config:
        """What it takes, without having measured, for a problem it can run; empty where there is nothing to choose."""

    def candidate_configs(self, problem: Problem) -> list[Config]:
        """What `pyprune tune` times for a problem it can run; the first is the default."""

    def run(self, call: Call, config: Config | None = None) -> Tensor:
        """`[M, D]`, by `config` (one of this backend's), or by the default."""


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def no_native_kernel(problem: Problem) -> str | None:
    """Why neither native library has a kernel for the dtypes of `problem`, in one line, or None."""
    if problem.dtype not in NATIVE_DTYPES:
        return f"no kernel for {problem.dtype}"
    if problem.weights not in (None, *NATIVE_DTYPES, torch.int8):
        return f"no kernel for {problem.weights} weights"
    return None


def row_by_row(call: Call, run: Callable[[Call], Tensor]) -> Tensor:
    """`run` for each row of x alone, so that no row sees another: the same memory layout, and the same kernels.

    Args:
        call: `[M, D]`; with lists of neurons for each token, or without.
        run: computes one call.
    """
    outs = []
    for m in range(call.x.shape[0]):
        row = slice(m, m + 1)
        own = call.index is not None and call.index.ndim == 2
        one = replace(
            call,
            x=call.x[row].clone(),  # where memory starts can change the order of sums too
            residual=None if call.residual is None else call.residual[row],
            index=call.index[row] if own and call.index is not None else call.index,
            count=call.count[row] if own and call.count is not None else call.count,
        )
        outs.append(run(one))
    return torch.cat(outs) if outs else torch.empty_like(call.x)


def load_all() -> dict[str, Backend]:
    """Every backend of the table, by name."""
    modules = [cast(Backend, importlib.import_module(f"{__name__}.{module}")) for module in TABLE]
    return {module.NAME: module for module in modules}
