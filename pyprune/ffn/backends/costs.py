"""Predicted time of Triton's two products and of cuBLAS's: launches, bytes over a rate, operations over a rate.

Nothing here has been measured by this repository; the rates are leads for an H100 or H200, and their ratios decide.
What `pyprune tune` measured comes before. `python -m pyprune.ffn.backends.costs` prints predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import scratch
from . import Problem

_BANDWIDTH = 4.3e12  # bytes a second that an H200 reads
# Operations a second that cuBLAS reaches with random matrices; float32 without TF32.
_OPERATIONS = {torch.float16: 788e12, torch.bfloat16: 788e12, torch.float32: 50e12}
_LAUNCH = 1.5e-6  # a kernel's start and end within a CUDA graph

# Of the bandwidth: weights through cuBLAS, and through Triton with its splits up to so many tokens, and without.
_SPLIT_TOKENS = 64
_CUBLAS_SHARE, _SPLIT_SHARE, _TILE_SHARE = 0.95, 0.95, 0.7
# Of cuBLAS's operations: tiles in Triton that have no tensor descriptors.
_TRITON_OPERATIONS = 0.72

NAMES = ("triton", "cublas")


@dataclass(frozen=True)
class Cost:
    """What one call asks of a CUDA device.

    Attributes:
        launches: kernels.
        read: seconds for the bytes of the weights.
        multiply: seconds for the operations of the products, which overlap with `read`.
        move: seconds for all other bytes: hidden activations, partial results, rows that are copied at every call.
    """

    launches: int
    read: float
    multiply: float
    move: float

    @property
    def seconds(self) -> float:
        """Of one call."""
        return self.launches * _LAUNCH + max(self.read, self.multiply) + self.move


def _size(dtype: torch.dtype | None, other: torch.dtype) -> int:
    return (dtype or other).itemsize


def kept_between_calls(problem: Problem) -> bool:
    """Whether the copied rows of a gather are taken to be kept, so that only a first call pays for them; see `scratch`.

    Said once for all calls of a problem, and from sizes alone: were it to follow what is kept now, the same call could
    have other bits later.
    """
    parts = 3 if problem.gated else 2
    rows = problem.kept * parts * problem.hidden_size * _size(problem.weights, problem.dtype)
    return scratch.holds_a_model_of(rows, problem.device)


def cost(problem: Problem, name: str) -> Cost:
    """The prediction for `problem` on CUDA.

    Args:
        problem: what to compute.
        name: one of `NAMES`.
    """
    m, d, k, parts = problem.tokens, problem.hidden_size, problem.kept, 3 if problem.gated else 2
    element = problem.dtype.itemsize
    weights = k * parts * d * _size(problem.weights, problem.dtype)
    rate = _OPERATIONS.get(problem.dtype, _OPERATIONS[torch.float32])
    multiply = 2.0 * k * parts * d * m / rate
    hidden = 2 * m * k * element  # written and read
    if name == "triton":
        few = m <= _SPLIT_TOKENS
        # Few tokens: four splits of the second product, and their sum.
        moved = hidden + (8 * 4 * m * d if few else 0)
        read = weights / _BANDWIDTH / (_SPLIT_SHARE if few else _TILE_SHARE)
        return Cost(3 if few else 2, read, multiply / _TRITON_OPERATIONS, moved / _BANDWIDTH)
    launches = 4 if problem.gated else 3
    if problem.gated:
        hidden += 3 * m * k * element  # two products written, read by act * mul
    if problem.gather and not kept_between_calls(problem):
        hidden += 2 * weights
        launches += 1
    return Cost(launches, weights / _BANDWIDTH / _CUBLAS_SHARE, multiply, hidden / _BANDWIDTH)


def fastest_first(problem: Problem) -> tuple[str, ...]:
    """`NAMES`, as predicted; a backend that cannot run the problem is among them."""
    return tuple(sorted(NAMES, key=lambda name: cost(problem, name).seconds))


def main() -> None:
    """Print predictions for LLaMA-3-8B's layer at half its width."""
    print("microseconds, LLaMA-3-8B 4096 x 7168 of 14336, bfloat16: launches, read, multiply, move, all")
    for gather in (False, True):
        for tokens in (16, 64, 128, 512, 1024, 4096):
            problem = Problem("cuda", torch.bfloat16, tokens, 4096, 14336, 7168, True, gather, "silu")
            for name in NAMES:
                c = cost(problem, name)
                parts = "".join(f"{1e6 * s:9.1f}" for s in (c.read, c.multiply, c.move, c.seconds))
                print(f"{'gather' if gather else 'compact':8}{tokens:6} {name:8}{c.launches:3}{parts}")


if __name__ == "__main__":
    main()
