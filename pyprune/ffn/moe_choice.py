"""Who runs experts: on a CPU the native kernel for few pairs of token and expert, torch for many; as measured by the
first `accelerate` of a shape on this machine, else as predicted. On a GPU Triton's kernels, where they can.

Three ways are timed beside each other: `cpu`, the native kernel over records, `torch`, the twin over them, and
`transformers`, the module as it is. Where the kernel never wins, the module stays. Of a gather the first two alone are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..base import reference
from ..base.clock import Job, interleave, median, timed
from ..base.experts import Experts
from ..base.files import cache_folder
from . import dispatch, tuned
from .backends import Problem
from .moe_operator import kernel_on, moe, why_no_kernel
from .quantisation import widened
from .tuned import Entry

# What is timed, few first: steps of decoding, and prompts.
TOKENS = (1, 4, 16, 64, 256)
SECONDS = 3.0
_ROUNDS = 3
ALL = 1 << 40  # pairs that no call has
Own = Callable[[Tensor, Tensor, Tensor], Tensor]


def key(experts: Experts, dtype: torch.dtype, picked: int, tokens: int) -> str:
    """What the table of this machine calls so many tokens of these experts."""
    return tuned.key(Problem.of_experts(experts, dtype, picked, tokens, "cpu"))


def unknown(experts: Experts, dtype: torch.dtype, picked: int) -> list[int]:
    """Those of `TOKENS` that were not timed on this machine yet."""
    return [tokens for tokens in TOKENS if key(experts, dtype, picked, tokens) not in tuned.known("cpu")]


def native_pairs(experts: Experts, dtype: torch.dtype, picked: int) -> int:
    """Most pairs of token and expert for which `auto` takes the device's kernel; 0 where there is none, `ALL` on a GPU.

    Args:
        experts: the records.
        dtype: of x.
        picked: K, how many experts a token goes to.
    """
    rows = experts.rows
    if why_no_kernel(rows.device.type, dtype, rows.dtype) is not None:
        return 0
    if kernel_on(rows.device.type) != "cpu":
        return ALL
    form = (experts.gated, experts.activation)
    gather = experts.index is not None
    alone = dispatch.native_tokens(dtype, rows.dtype, experts.hidden_size, gather, "cpu", experts.most, *form)
    low, high = 0, None
    for tokens in TOKENS:
        seconds = {e.backend: e.seconds for e in tuned.known("cpu").get(key(experts, dtype, picked, tokens), [])}
        if not {"cpu", "torch"} <= seconds.keys():
            continue
        if seconds["cpu"] > seconds["torch"]:
            high = low
            break
        low = tokens * picked
    # As an FFN of as many tokens as experts have on average; of those that have more, by half of that.
    most = max(low, alone * len(rows) // 2)
    return most if high is None else min(most, high)


def why_slower(experts: Experts, dtype: torch.dtype, picked: int) -> str | None:
    """Why the module had better stay as it is, where it was measured to be faster at every step of decoding."""
    table, steps = tuned.known("cpu"), TOKENS[:3]
    found = [{e.backend: e.seconds for e in table.get(key(experts, dtype, picked, m), [])} for m in steps]
    timed = [f for f in found if {"cpu", "transformers"} <= f.keys()]
    if not timed or any(f["cpu"] <= f["transformers"] for f in timed):
        return None
    most = max(f["cpu"] / f["transformers"] for f in timed)
    return f"Transformers' own path was measured to be up to {most:.2f} times as fast"


def _is_right(experts: Experts, dtype: torch.dtype) -> bool:
    """Whether the kernel errs at most twice as much as torch, on one token and one expert."""
    x = torch.randn(1, experts.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = reference.ffn(x.double(), widened(experts.one(0)))
    index, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    error, allowed = ((moe(x, experts, index, weights, backend=b).double() - exact).norm() for b in ("cpu", "torch"))
    return bool(error <= 2 * allowed + 1e-6 * exact.norm())


def _jobs(experts: Experts, own: Own, dtype: torch.dtype, picked: int, tokens: int) -> dict[str, Job]:
    """What is timed for so many tokens, each of which goes to other random experts."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, experts.hidden_size, generator=generator).to(dtype)
    index = torch.rand(tokens, len(experts.rows), generator=generator).argsort(1)[:, :picked].contiguous()
    weights = torch.full((tokens, picked), 1 / picked, dtype=dtype)
    runs: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: moe(x, experts, index, weights, backend=name)  # type: ignore[misc]
        for name in ("cpu", "torch")
    }
    if experts.index is None:  # else it computes something else
        runs["transformers"] = lambda: own(x, index, weights)
    return {name: timed(run, time.perf_counter) for name, run in runs.items()}


@torch.no_grad()
def measure(experts: Experts, own: Own, dtype: torch.dtype, picked: int, seconds: float = SECONDS) -> None:
    """Time what the table of this machine does not have yet, for so many seconds at most; the rest is predicted.

    On a CPU; elsewhere nothing is timed.

    Args:
        experts: the records.
        own: the module as Transformers runs it.
        dtype: of x.
        picked: K.
        seconds: after which nothing else is begun.
    """
    new = unknown(experts, dtype, picked)
    weights = experts.rows.dtype
    if not new or why_no_kernel(experts.rows.device.type, dtype, weights, "cpu") or not _is_right(experts, dtype):
        return
    deadline = time.monotonic() + seconds
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        for tokens in new:
            if time.monotonic() > deadline:
                break
            samples = interleave(_jobs(experts, own, dtype, picked, tokens), _ROUNDS)
            entries = sorted((Entry(name, {}, median(s)) for name, s in samples.items()), key=lambda e: e.seconds)
            tuned.store("cpu", {key(experts, dtype, picked, tokens): entries})
    except OSError:
        return
    tuned.reload()
