"""What `accelerate` measures on a CPU before it swaps a model's FFNs: whether the native kernel or torch is faster.

Where torch's products overtake the native kernel depends on the machine: matrix tiles, caches, the number of threads.
So each layer shape is timed once, at the numbers of tokens between which that happens, into the table that `pyprune
tune` fills with more care: a second or two, and never again on this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from ..base.files import cache_folder
from ..model.families import FFN
from ..model.mask import Mask
from . import native, tuned
from .backends import Problem
from .contest import Effort
from .quantisation import WEIGHTS
from .tune import tune

TOKENS = (1, 8, 16, 32, 64, 128, 512)
SECONDS = 2.0
_EFFORT = Effort(copy_bytes=64 << 20, rounds=(1, 3), sample=5e-4, problem=0.05)


def problems(ffns: Sequence[FFN], mode: str, mask: Mask | None, weights: str | None) -> list[Problem]:
    """What the FFNs will ask the operator on a CPU, at `TOKENS`, one of each shape; arguments as of `accelerate`."""
    found: dict[Problem, None] = {}
    for ffn in ffns:
        down = ffn.weights().down
        if down.device.type != "cpu":
            continue
        kept = ffn.intermediate_size if mask is None else len(mask.layers[ffn.layer])
        size = ffn.intermediate_size if mode == "gather" else kept
        form = (ffn.gated, mode == "gather", ffn.activation, WEIGHTS[weights] if weights else down.dtype)
        one = Problem("cpu", down.dtype, 1, ffn.hidden_size, size, kept, *form)
        found[dataclasses.replace(tuned.representative(one), tokens=1)] = None
    return at_all_tokens(found)


def at_all_tokens(wanted: Iterable[Problem]) -> list[Problem]:
    """Those problems at `TOKENS`, the fewest first."""
    return [tuned.representative(dataclasses.replace(one, tokens=m)) for m in TOKENS for one in wanted]


def measure(wanted: Sequence[Problem], seconds: float = SECONDS) -> None:
    """Time what the user's table does not have yet, for so many seconds at most; what is left is predicted.

    Without the native kernels there is nothing to choose; without a folder for the table nothing is measured.
    """
    table = tuned.known("cpu")
    new = [problem for problem in wanted if tuned.key(problem) not in table]
    if not new or native.load() is not None:
        return
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            tune(new, seconds, effort=_EFFORT)
    except OSError:
        return
