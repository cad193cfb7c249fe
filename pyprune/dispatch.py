"""The one place that chooses a backend."""

from __future__ import annotations

import functools

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


@functools.cache
def backends() -> dict[str, Backend]:
    """Every backend, by name."""
    return load_all()


def names() -> list[str]:
    """`auto` and the name of every backend."""
    return ["auto", *backends()]


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
    order = (backend,) if backend != "auto" else _ORDER.get((problem.device, problem.gather), _ELSEWHERE)
    reasons = []
    for name in order:
        reason = backends()[name].why_not(problem)
        if reason is None:
            return backends()[name]
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend for {problem}: {'; '.join(reasons)}")
