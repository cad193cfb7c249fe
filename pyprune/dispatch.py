"""The one place that chooses a backend."""

from __future__ import annotations

import functools

import torch

from . import native
from .backends import Backend, Problem, load_all
from .errors import BackendError, check_choice

# Order in which `auto` asks, by device and form. On CUDA a compact FFN goes to torch (cuBLAS), which is known to be
# near the ceiling on large layers, until our kernels have been timed against it; a gather goes to the kernels, since
# torch must copy the kept rows on every call.
_ORDER: dict[tuple[str, bool], tuple[str, ...]] = {
    ("cuda", False): ("torch", "triton"),
    ("cuda", True): ("triton", "torch"),
}
_ELSEWHERE = ("torch",)

# Most tokens for which `auto` prefers the native kernel on a CPU, by dtype of the record and gather, for layers of at
# most _NARROW and for wider ones: with more tokens arithmetic outweighs the bytes of the weights, and torch's matrix
# products are faster. Measured with AVX-512 and AMX, see bench/notes/cpu.md; a gather goes further, since torch must
# first copy rows, and so does int8, which it must cast.
_NARROW = 1024
_NATIVE_TOKENS: dict[tuple[torch.dtype, bool], tuple[int, int]] = {
    (torch.float32, False): (32, 24),
    (torch.float32, True): (64, 128),
    (torch.bfloat16, False): (128, 64),
    (torch.bfloat16, True): (128, 512),
    (torch.float16, False): (32, 16),
    (torch.float16, True): (64, 128),
    (torch.int8, False): (256, 256),
    (torch.int8, True): (256, 256),
}
# At most so many where tokens are not multiplied by matrix tiles, which need bfloat16 tokens.
_WITHOUT_TILES = {torch.bfloat16: 16, torch.int8: 64}


@functools.cache
def backends() -> dict[str, Backend]:
    """Every backend, by name."""
    return load_all()


def names() -> list[str]:
    """`auto` and the name of every backend."""
    return ["auto", *backends()]


@functools.cache
def native_tokens(dtype: torch.dtype, weights: torch.dtype, hidden_size: int, gather: bool) -> int:
    """Most tokens for which `auto` takes the native kernel on a CPU; 0 where there is none for these dtypes.

    Args:
        dtype: of x.
        weights: of the record.
        hidden_size: D.
        gather: the form.
    """
    problem = Problem("cpu", dtype, 1, 1, 1, 1, True, gather, "silu", weights)
    if backends()["cpu"].why_not(problem) is not None:
        return 0
    most = _NATIVE_TOKENS[weights, gather][hidden_size > _NARROW]
    tiles = dtype == torch.bfloat16 and native.isa() == "amx"
    return most if tiles else min(most, _WITHOUT_TILES.get(weights, most))


def _order(problem: Problem) -> tuple[str, ...]:
    if problem.device != "cpu":
        return _ORDER.get((problem.device, problem.gather), _ELSEWHERE)
    most = native_tokens(problem.dtype, problem.weights or problem.dtype, problem.hidden_size, problem.gather)
    return ("cpu", "torch") if problem.tokens <= most else ("torch", "cpu")


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend that runs `problem`.

    Args:
        problem: what to compute.
        backend: `auto`, or a name that is then used or refused, never replaced.

    Raises:
        InputError: no backend of that name.
        BackendError: the forced backend cannot run the problem, or none can; with the reasons.
    """
    check_choice(backend, "backend", names())
    reasons = []
    for name in _order(problem) if backend == "auto" else (backend,):
        reason = backends()[name].why_not(problem)
        if reason is None:
            return backends()[name]
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend for {problem}: {'; '.join(reasons)}")
