"""`moe(x, experts, index, weights)`: a layer's experts after their router, and the operator `torch.ops.pyprune.moe`.

    y[t] = sum over k of weights[t, k] * ffn(x[t], experts.one(index[t, k]))

Four backends run it: `torch`, the twin, anywhere, `cpu`, the native library's kernel, and on CUDA devices `triton` and
`cuda`, the native library's kernels for few pairs of token and expert.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..base import reference
from ..base.errors import BackendError, check_choice
from ..base.experts import Experts
from . import native, tuned
from .backends import NATIVE_DTYPES, Config, Problem, cuda, triton
from .operators import LIBRARY
from .tuned import Entry

BACKENDS = ("torch", "cpu", "triton", "cuda")
_SCHEMA = (
    "moe(Tensor x, Tensor rows, Tensor? scales, Tensor? kept, Tensor? counts, Tensor index, Tensor weights, "
    "bool gated, str activation, str backend, bool batch_invariant) -> Tensor"
)
_GRADIENTS = (
    "moe_gradients(Tensor grad, Tensor x, Tensor rows, Tensor? scales, Tensor? kept, Tensor? counts, Tensor index, "
    "Tensor weights, bool gated, str activation, bool[] wanted) -> Tensor[]"
)
_TENSORS = 7  # the first arguments; `kept` and `counts` are `Experts.index` and `Experts.counts`
_DIFFERENTIABLE = (0, 1, 6)  # x, rows, weights


def kernel_on(device: str) -> str:
    """The backend whose kernel `auto` takes on a type of device."""
    return "triton" if device == "cuda" else "cpu"


def why_no_kernel(device: str, dtype: torch.dtype, weights: torch.dtype, backend: str | None = None) -> str | None:
    """Why a kernel cannot run experts, in one line, or None.

    Args:
        device: type of device.
        dtype: of x.
        weights: of the rows.
        backend: one of `BACKENDS`; None for what `auto` takes on the device where nothing was measured.
    """
    if backend == "torch":
        return None
    if backend == cuda.NAME:
        return cuda.why_no_experts(device, dtype, weights)
    if (backend or kernel_on(device)) == triton.NAME:
        return triton.why_no_kernel(device, dtype, weights)
    if device != "cpu":
        return f"needs tensors on a CPU, not on {device}"
    for one, what in ((dtype, ""), (weights, " weights")):
        if one not in NATIVE_DTYPES and not (what and one == torch.int8):
            return f"no kernel for {one}{what}"
    if reason := native.load():
        return reason
    if not hasattr(torch.ops.pyprune, "moe_cpu"):
        return "the native CPU library is older than its kernel of experts: run `make native`, or reinstall pyprune"
    return None


def _chosen(x: Tensor, experts: Experts, picked: int, backend: str, batch_invariant: bool) -> tuple[str, Config | None]:
    """The backend, and what `pyprune tune` found to be its best configuration, or None for what it takes by itself.

    A configuration is meant for a number of tokens, so batch-invariant calls have the backend's own.
    """
    device = x.device.type
    if batch_invariant or backend in ("torch", "cpu"):
        return kernel_on(device) if backend == "auto" else backend, None
    entries = _measured(Problem.of_experts(experts, x.dtype, picked, len(x), device))
    if backend == "auto":
        return (entries[0].backend, entries[0].config) if entries else (kernel_on(device), None)
    return backend, next((entry.config for entry in entries if entry.backend == backend), None)


@functools.lru_cache(maxsize=4096)
def _measured(problem: Problem) -> tuple[Entry, ...]:
    """What was measured of this device for such calls and can still run, the fastest first."""
    weights = problem.weights or problem.dtype
    found = tuned.find(problem)
    return tuple(
        entry
        for entry in found
        if entry.backend in BACKENDS and why_no_kernel(problem.device, problem.dtype, weights, entry.backend) is None
    )


tuned.DEPENDENT.append(_measured.cache_clear)


def _native(x: Tensor, experts: Experts, index: Tensor, weights: Tensor) -> Tensor:
    routing = index.long().contiguous(), weights.float().contiguous()
    out: Tensor = torch.ops.pyprune.moe_cpu.default(
        x, experts.rows, experts.scales, experts.index, experts.counts, *routing, experts.gated, experts.activation
    )
    return out


def _run(
    x: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    kept: Tensor | None,
    counts: Tensor | None,
    index: Tensor,
    weights: Tensor,
    gated: bool,
    activation: str,
    backend: str,
    batch_invariant: bool,
) -> Tensor:
    """Compute by the backend that is named, or `auto`, that which was measured to be the fastest on the device."""
    experts = Experts.unchecked(rows, gated, activation, scales, kept, counts)
    backend, config = _chosen(x, experts, index.shape[1], backend, batch_invariant)
    # The kernels on a GPU do not wait for what index holds, so that a CUDA graph can be captured.
    if backend not in (triton.NAME, cuda.NAME) or not index.is_cuda:
        experts.check_index(index)
    run = reference.moe
    if backend != "torch":
        if reason := why_no_kernel(x.device.type, x.dtype, rows.dtype, backend):
            raise BackendError(f"{backend}: {reason}")
        run = _native
    if backend == triton.NAME:
        return triton.run_experts(x, experts, index, weights, config, batch_invariant)
    if backend == cuda.NAME:
        return cuda.run_experts(x, experts, index, weights, config)
    if not batch_invariant:
        return run(x, experts, index, weights)
    # Each token alone and from fresh memory, for where it starts can change the order of sums too.
    alone = [run(x[t : t + 1].clone(), experts, index[t : t + 1], weights[t : t + 1]) for t in range(len(x))]
    return torch.cat(alone) if alone else torch.empty_like(x)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradients(
    grad: Tensor,
    x: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    kept: Tensor | None,
    counts: Tensor | None,
    index: Tensor,
    weights: Tensor,
    gated: bool,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Those of x, rows and weights that are wanted, by differentiating the twin."""
    given = [t.detach().requires_grad_(wants) for t, wants in zip((x, rows, weights), wanted, strict=True)]
    with torch.enable_grad():
        experts = Experts.unchecked(given[1], gated, activation, scales, kept, counts)
        out = reference.moe(given[0], experts, index, given[2])
        asked = [t for t in given if t.requires_grad]
        # A call without tokens depends on nothing.
        if not out.requires_grad:
            return [torch.zeros_like(t) for t in asked]
        return list(torch.autograd.grad(out, asked, grad, materialize_grads=True))


def _fake_gradients(grad: Tensor, *given: Any) -> list[Tensor]:
    found = (given[i] for i in _DIFFERENTIABLE)
    return [torch.empty_like(t) for t, wants in zip(found, given[-1], strict=True) if wants]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.form = inputs[_TENSORS : _TENSORS + 2]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = iter(torch.ops.pyprune.moe_gradients.default(grad, *ctx.saved_tensors, *ctx.form, wanted))
    grads: list[Tensor | None] = [None] * (_TENSORS + 4)
    for i, wants in zip(_DIFFERENTIABLE, wanted, strict=True):
        grads[i] = next(found) if wants else None
    return tuple(grads)


# What it computes depends on the values of `index`, so that its backward is an operator of its own, which compilers
# take as it is.
for _schema, _function, _fakes in ((_SCHEMA, _run, _fake), (_GRADIENTS, _gradients, _fake_gradients)):
    _name = _schema.partition("(")[0]
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyprune::{_name}", _fakes, lib=LIBRARY)
torch.library.register_autograd("pyprune::moe", _backward, setup_context=_save, lib=LIBRARY)
MOE = torch.ops.pyprune.moe.default


def arguments(
    x: Tensor, experts: Experts, index: Tensor, weights: Tensor, backend: str, batch_invariant: bool = False
) -> tuple[Any, ...]:
    """What the operator takes."""
    e = experts
    return (
        x, e.rows, e.scales, e.index, e.counts, index, weights, e.gated, e.activation, backend, batch_invariant,
    )  # fmt: skip


def moe(
    x: Tensor,
    experts: Experts,
    index: Tensor,
    weights: Tensor,
    *,
    backend: str = "torch",
    batch_invariant: bool = False,
) -> Tensor:
    """`reference.moe` by the backend that is named, differentiable, once, in x, floating rows and weights.

    Args:
        x: `[T, D]`.
        experts: the records.
        index: `[T, K]` int64 or int32, the experts of each token.
        weights: `[T, K]` floating point, what their results are multiplied by.
        backend: one of `BACKENDS`, which is used or refused.
        batch_invariant: a row of the result must not depend, to the bit, on the rows beside it.

    Returns:
        `[T, D]` in the dtype of `x`.

    Raises:
        InputError: x or the routing does not fit the experts, an expert that there is not (on a GPU, where `triton` and
            `cuda` wait for nothing, the token becomes NaN instead), or no such backend.
        BackendError: the backend cannot run this.
    """
    check_choice(backend, "backend", BACKENDS)
    experts.check_call(x, index, weights)
    out: Tensor = MOE(*arguments(x, experts, index, weights, backend, batch_invariant))
    return out
