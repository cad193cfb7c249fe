"""The one place that chooses a backend."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from dataclasses import dataclass

import torch

from ..base import reference
from ..base.errors import BackendError, check_choice
from . import native, scratch, tuned
from .backends import Backend, Config, Problem, load_all
from .tuned import Entry

# Most tokens for which `auto` takes the native CUDA kernel, by whether weights are int8. Measured on an H200, see
# bench/notes/gpu.md: with one token it is within some percent of the fastest in a CUDA graph, and asks the host for a
# fifth of the time; with four cuBLAS is 1.8 times as fast, but has no int8. _CUDA_TOKENS: it is not offered for more.
_DECODE_TOKENS = {False: 1, True: 4}
_CUDA_TOKENS = 8
# Most tokens for which reading a gather's rows where they are beats copying them at every call. From measured times.
_COPIED_TOKENS = 256

# Most tokens for which `auto` prefers the native kernel on a CPU, by dtype of the record and gather, for layers of at
# most _NARROW and for wider ones: with more tokens arithmetic outweighs the bytes of the weights, and torch's matrix
# products are faster. Measured with AVX-512 and AMX, see bench/notes/cpu.md; a gather goes further, since torch must
# first copy rows, and so does int8, which it must cast. `pyprune tune` measures them for a layer on this machine.
_NARROW = 1024
_NATIVE_TOKENS: dict[tuple[torch.dtype, bool], tuple[int, int]] = {
    (torch.float32, False): (64, 64),
    (torch.float32, True): (64, 128),
    (torch.bfloat16, False): (128, 64),
    (torch.bfloat16, True): (128, 512),
    (torch.float16, False): (32, 16),
    (torch.float16, True): (64, 128),
    (torch.int8, False): (256, 256),
    (torch.int8, True): (256, 256),
    (torch.uint8, False): (128, 128),  # int4; above, the library writes out its rows for torch
    (torch.uint8, True): (128, 128),
}
# At most so many where tokens are not multiplied by matrix tiles, which need bfloat16 tokens.
_WITHOUT_TILES = {torch.bfloat16: 64}
_ANY = 1 << 40
# From so many tokens on both are bound by arithmetic: who needs less than _BY_FAR of the other's time there, does for
# any number.
_MANY, _BY_FAR = 512, 0.75


@dataclass(frozen=True)
class Choice:
    """Who runs a problem, and how.

    Attributes:
        backend: the backend.
        config: what was measured to be its best, or None for what it takes by itself.
        source: of the choice: `tuned` on this machine, or `predicted`.
    """

    backend: Backend
    config: Config | None
    source: str


@functools.cache
def backends() -> dict[str, Backend]:
    """Every backend, by name."""
    return load_all()


def names() -> list[str]:
    """`auto` and the name of every backend."""
    return ["auto", *backends()]


def _predicted_tokens(problem: Problem) -> int:
    """Most tokens for which the native kernel of the problem's device is the best, as predicted."""
    if problem.device == "cuda":
        return _DECODE_TOKENS[problem.weights == torch.int8]
    weights = problem.weights or problem.dtype
    if problem.dtype == weights == torch.float16 and not reference.multiplies_half():
        return _ANY
    most = _NATIVE_TOKENS[weights, problem.gather][problem.hidden_size > _NARROW]
    tiles = problem.dtype == torch.bfloat16 and native.isa() == "amx"
    return most if tiles else min(most, _WITHOUT_TILES.get(weights, most))


def native_is_best(problem: Problem) -> bool | None:
    """Whether the native kernel, by itself, was measured to be the best; None where nothing was measured."""
    entries = _measured(problem)
    if not entries:
        return None
    best, own = entries[0], backends()[problem.device]
    # On a CPU the operator by itself has no configuration.
    default = {} if problem.device == "cpu" else own.default_config(tuned.representative(problem))
    return best.backend == problem.device and _text(best.config) == _text(default)


def _by_far(problem: Problem) -> bool:
    """Whether the best that was measured is so by as much as will stay true of more tokens."""
    entries = _measured(problem) if problem.tokens >= _MANY else []
    return len(entries) > 1 and entries[0].seconds <= _BY_FAR * entries[1].seconds


def _crossover(problem: Problem) -> int:
    """Most tokens for which the native kernel is the best: as predicted, within what was measured."""
    low, high, below = 0, None, 0
    for tokens in tuned.TOKENS:
        same = dataclasses.replace(problem, tokens=tokens)
        best = native_is_best(same)
        if best is False:
            high = below
            break
        low, below = tokens if best else low, tokens
        if best and _by_far(same):
            low = _ANY
    most = max(low, _predicted_tokens(problem))
    return most if high is None else min(most, high)


@functools.cache
def native_tokens(
    dtype: torch.dtype,
    weights: torch.dtype,
    hidden_size: int,
    gather: bool,
    device: str = "cpu",
    neurons: int = 1,
    gated: bool = True,
    activation: str = "silu",
) -> int:
    """Most tokens for which `auto` takes the native kernel of a device; 0 where there is none for these dtypes.

    Args:
        dtype: of x.
        weights: of the record.
        hidden_size: D.
        gather: the form.
        device: `cpu` or `cuda`.
        neurons: K; with `gated` and `activation` it says which measurements count.
    """
    problem = Problem(device, dtype, 1, hidden_size, neurons, neurons, gated, gather, activation, weights)
    own = backends().get(device)
    return 0 if own is None or own.why_not(problem) is not None else _crossover(problem)


def _native_tokens(problem: Problem) -> int:
    weights = problem.weights or problem.dtype
    layer = (problem.hidden_size, problem.gather, problem.device, problem.kept, problem.gated, problem.activation)
    return native_tokens(problem.dtype, weights, *layer)


def _order(problem: Problem) -> tuple[str, ...]:
    """Whom `auto` asks, as predicted."""
    if problem.device == "cpu":
        native_first = problem.weights == torch.uint8 or problem.tokens <= _native_tokens(problem)
        return ("cpu", "torch") if native_first else ("torch", "cpu")
    if problem.device != "cuda":
        return ("torch",)
    if problem.batch_invariant:
        return ("triton", "cuda", "torch")  # one for every number of tokens
    if problem.tokens <= _DECODE_TOKENS[problem.weights == torch.int8]:
        return ("cuda", "triton", "cublas", "torch")
    few = ("cuda",) if problem.tokens <= _CUDA_TOKENS else ()
    if problem.tokens <= _COPIED_TOKENS and problem.gather and not _rows_are_kept(problem):
        return ("triton", *few, "cublas", "torch")
    return ("cublas", "triton", *few, "torch")


def _rows_are_kept(problem: Problem) -> bool:
    """Whether the copied rows of a gather are taken to be kept, so that only a first call pays for them; see `scratch`.

    Said once for all calls of a problem, and from sizes alone: were it to follow what is kept now, the same call could
    have other bits later.
    """
    element = (problem.weights or problem.dtype).itemsize
    rows = problem.kept * (3 if problem.gated else 2) * problem.hidden_size * element
    return scratch.holds_a_model_of(rows, problem.device)


def _text(config: Config) -> str:
    return json.dumps(dict(config), sort_keys=True)


@functools.cache
def _warn(message: str) -> None:
    """Once."""
    warnings.warn(message, stacklevel=2)


def _refused(problem: Problem, entry: Entry) -> bool:
    """Whether what was measured cannot be used any more."""
    backend = backends().get(entry.backend)
    reason = "there is no backend of that name" if backend is None else backend.why_not(problem)
    if backend is not None and reason is None:
        offered = backend.candidate_configs(tuned.representative(problem))
        if _text(entry.config) in map(_text, offered):
            return False
        reason = f"it does not offer the configuration {_text(entry.config)}"
    _warn(f"a tuned choice of backend {entry.backend} is skipped: {reason}")
    return True


def _measured(problem: Problem) -> list[Entry]:
    return [entry for entry in tuned.find(problem) if not _refused(problem, entry)]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str = "auto") -> Choice:
    """The backend that runs `problem`, and its configuration: as measured, else as predicted.

    With `batch_invariant` neither depends on the number of tokens.

    Args:
        problem: what to compute.
        backend: `auto`, or a name that is then used or refused, never replaced.

    Raises:
        InputError: no backend of that name.
        BackendError: the forced backend cannot run the problem, or none can; with the reasons.
    """
    check_choice(backend, "backend", names())
    if problem.batch_invariant:
        problem = dataclasses.replace(problem, tokens=1)
    entries = _measured(problem)
    configs: dict[str, Config] = {}
    for entry in entries:
        configs.setdefault(entry.backend, entry.config)
    reasons = []
    # A dict has every name once, at its first place.
    for name in dict.fromkeys([*configs, *_order(problem)]) if backend == "auto" else (backend,):
        reason = backends()[name].why_not(problem)
        if reason is None:
            # A configuration may be meant for so many tokens; row by row, a backend takes its own.
            config = None if problem.batch_invariant else configs.get(name)
            return Choice(backends()[name], config, "tuned" if name in configs else "predicted")
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend for {problem}: {'; '.join(reasons)}")


tuned.DEPENDENT.extend((choose.cache_clear, native_tokens.cache_clear, _warn.cache_clear))
