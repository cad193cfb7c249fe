"""The backend table. A backend is one file here and one line in `TABLE`.

A backend module has:

    NAME: str
    def why_not(problem: Problem) -> str | None     one line when it cannot run the problem, else None
    def run(call: Call) -> Tensor                   `[M, D]`
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

TABLE: tuple[str, ...] = ("torch_eager", "cpu", "triton")


@dataclass(frozen=True)
class Problem:
    """What a backend must be able to compute.

    Attributes:
        device: device type, `cpu` or `cuda`.
        dtype: of x, biases and residual.
        tokens: M.
        hidden_size: D.
        intermediate_size: F, rows of the record.
        kept: K, neurons used; equals F unless `gather`.
        gated, gather: the form.
        activation: a key of `reference.ACTIVATIONS`.
        weights: dtype of the record; None for that of x.
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


@dataclass(frozen=True)
class Call:
    """One call of an FFN operator; layouts as in `reference`.

    Attributes:
        x: `[M, D]`.
        record: `[F, P*D]`.
        index: `[K]` int32 or None.
        scales: `[F, P]` float32 with an int8 record, else None.
        neuron_bias: `[F, P-1]` or None.
        down_bias: `[D]` or None.
        residual: `[M, D]` or None.
        gated: P = 3 if true, else 2.
        activation: a key of `reference.ACTIVATIONS`.
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


class Backend(Protocol):
    NAME: str

    def why_not(self, problem: Problem) -> str | None: ...

    def run(self, call: Call) -> Tensor: ...


def load_all() -> dict[str, Backend]:
    """Every backend of the table, by name."""
    modules = [cast(Backend, importlib.import_module(f"{__name__}.{module}")) for module in TABLE]
    return {module.NAME: module for module in modules}
