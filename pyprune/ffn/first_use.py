"""What `accelerate` measures on a CPU before it swaps a model's FFNs: whether the native kernel or torch is faster.

Where torch's products overtake the native kernel depends on the machine: matrix tiles, caches, the number of threads.
So each layer shape is timed once, at the numbers of tokens between which that happens, into the table that `pyprune
tune` fills with more care: a second or two, and never again on this machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

import torch

from ..base.files import cache_folder
from ..model.families import FFN
from ..model.mask import Mask
from . import dispatch, native, tuned
from .backends import Problem
from .contest import Effort
from .quantisation import WEIGHTS
from .tune import tune

SECONDS = 2.0
# Numbers of tokens: first these; then more where the native kernel wins the last of them, else fewer until it wins.
_FIRST, _MORE, _FEWER = (1, 128), (512,), (64, 32, 16, 8)
_EFFORT = Effort(copy_bytes=64 << 20, rounds=(1, 3), sample=5e-4, problem=0.05)


def problems(ffns: Sequence[FFN], mode: str, mask: Mask | None, weights: str | None) -> list[Problem]:
    """What the FFNs will ask the operator on a CPU, one of each shape, of one token; arguments as of `accelerate`."""
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
    return list(found)


def measure(layers: Iterable[Problem], seconds: float = SECONDS) -> None:
    """Time what the user's table lacks of these layers, for so many seconds at most; what is left is predicted.

    Without the native kernels there is nothing to choose; without a folder for the table nothing is measured.

    Args:
        layers: one problem of each, of any number of tokens.
        seconds: after which nothing else is begun.
    """
    if native.load() is not None:
        return
    deadline, shapes = time.monotonic() + seconds, list(layers)
    try:
        for tokens in _FIRST:
            _measure([_at(layer, tokens) for layer in shapes], deadline)
        for layer in shapes:
            for tokens in _MORE if dispatch.native_is_best(_at(layer, _FIRST[-1])) else _FEWER:
                _measure([_at(layer, tokens)], deadline)
                if dispatch.native_is_best(_at(layer, tokens)):
                    break
    except OSError:
        return


def _at(layer: Problem, tokens: int) -> Problem:
    return tuned.representative(dataclasses.replace(layer, tokens=tokens))


def _measure(wanted: Sequence[Problem], deadline: float) -> None:
    table, left = tuned.known("cpu"), deadline - time.monotonic()
    new = [problem for problem in wanted if tuned.key(problem) not in table]
    if not new or left <= 0:
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        tune(new, left, effort=_EFFORT)
