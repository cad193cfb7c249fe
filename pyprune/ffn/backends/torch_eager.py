"""Plain PyTorch over slices of the record: runs everything, everywhere."""

from __future__ import annotations

from torch import Tensor

from ...base import reference
from ...base.record import Record
from . import Config, Problem, row_by_row

NAME = "torch"


def why_not(problem: Problem) -> str | None:
    """Always None: PyTorch runs every problem."""
    return None


def default_config(problem: Problem) -> Config:
    """Nothing to choose."""
    return {}


def candidate_configs(problem: Problem) -> list[Config]:
    """The default alone."""
    return [{}]


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """Run by `reference.ffn`; batch-invariant row by row, for torch chooses kernels by their number."""
    if batch_invariant:
        return row_by_row(x, lambda row: reference.ffn(row, record))
    return reference.ffn(x, record)
