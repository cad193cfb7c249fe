"""What works here: machine, versions, backends, and what `auto` would choose; the facts behind `pyprune doctor`."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..base import machine
from ..base.errors import BackendError, InputError
from ..ffn import dispatch, native, tuned
from ..ffn.backends import Problem
from ..ffn.quantisation import WEIGHTS, name_of
from ..model import loading

# Of x, and of the weights where they have another.
_DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "int4"),
)
_LAYER = (4096, 14336, 7168)  # LLaMA-3-8B's at half its width


def _states() -> dict[str, dict[str, str]]:
    """Backend -> device type -> `usable`, or why not in one line."""
    states: dict[str, dict[str, str]] = {}
    for device, (name, backend) in itertools.product(("cpu", "cuda"), dispatch.backends().items()):
        reason = backend.why_not(Problem(device, torch.float32, 1, 64, 64, 64, True, False, "silu"))
        if device == "cuda" and not torch.cuda.is_available():
            reason = reason or "torch sees no CUDA device"
        states.setdefault(name, {})[device] = reason or "usable"
    return states


def _choice(problem: Problem) -> dict[str, str]:
    """The backend, its configuration, and where the choice is from."""
    try:
        chosen = dispatch.choose(problem)
    except BackendError as error:
        return {"backend": str(error), "configuration": "", "source": ""}
    config = chosen.backend.default_config(problem) if chosen.config is None else chosen.config
    words = ", ".join(f"{name} {value}" for name, value in config.items())
    return {"backend": chosen.backend.NAME, "configuration": words, "source": chosen.source}


def _choices() -> list[dict[str, str]]:
    """What `auto` takes for a layer of LLaMA-3-8B's shape at half its width, by device, dtype, form and tokens."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        {
            "device": device,
            "dtype": name_of(dtype) + (f", {weights} weights" if weights else ""),
            "form": "gather" if gather else "compact",
            "tokens": str(tokens),
            **_choice(
                Problem(device, dtype, tokens, *_LAYER, True, gather, "silu", WEIGHTS[weights] if weights else None)
            ),
        }
        for device, (dtype, weights), gather, tokens in itertools.product(devices, _DTYPES, (False, True), (1, 512))
    ]


def _measured() -> list[dict[str, str]]:
    """What was timed on this machine, by `accelerate` or `pyprune tune`: the fastest of each layer, and by how much."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, entries in tuned.known(device).items():
            best, *others = entries
            ahead = f"{others[0].seconds / best.seconds:.2f}x {others[0].backend}" if others else ""
            rows.append({"device": device, "layer": name, "backend": best.backend, "as fast as": ahead})
    return rows


def found_here() -> dict[str, Any]:
    """JSON values: `machine` (see `machine.facts`), `native` and `native_cuda` (see `native.facts`),
    `cuda_devices` (see `native.cuda_devices`), `backends`, `choices`, `measured`, and `demo`, the state of the demo
    model.
    """
    try:
        demo = f"usable ({loading.demo_file().name})"
    except InputError as error:
        demo = str(error)
    return {
        "machine": machine.facts(),
        "native": native.facts(),
        "native_cuda": native.facts("cuda"),
        "cuda_devices": native.cuda_devices(),
        "backends": _states(),
        "choices": _choices(),
        "measured": _measured(),
        "demo": demo,
    }
