"""The encoder's speed: dense, cut, and with `PrunedMLP`, in one run, beside what fewer neurons alone allow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import accelerate
from pyprune.base.clock import clock, interleave, median, timed
from pyprune.base.errors import check
from pyprune.model.families import find_ffns
from pyprune.speed.roofline import amdahl
from pyprune.speed.timing import ffn_pass, ffn_units

DENSE, COMPACT, DENSE_FAST, FAST = "dense", "compact", "dense, PrunedMLP", "compact, PrunedMLP"
WITHOUT = "without FFNs"


class _Nothing(nn.Module):
    """In the place of an FFN: it adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _without_ffns(encoder: Any) -> Any:
    bare = copy.deepcopy(encoder)
    for ffn in find_ffns(bare):
        bare.set_submodule(ffn.name, _Nothing())
    return bare


@torch.no_grad()
def encoder_speed(
    dense: Any, compact: Any, length: int, batches: Sequence[int] = (1, 32), rounds: int = 15
) -> dict[str, Any]:
    """Median times of one pass of each encoder and of its FFNs alone, all in turn, and ratios to the dense one.

    Args:
        dense, compact: encoders; they stay as they are.
        length: tokens of a string.
        batches: strings of a pass.
        rounds: recorded, after one that is not.

    Returns:
        By batch: `share` of the dense encoder's time that it is faster by without FFNs, `ceiling` (Amdahl's law: that
        share costs as much less as there are fewer neurons, and nothing else changes), and for each encoder `seconds`,
        `ratio` (above 1 is faster), `ffn_seconds`, `ffn_ratio`; `ffn_ceiling` is the ratio of neurons.

    Raises:
        InputError: no batch, or no round.
    """
    check(len(batches) > 0 and min(batches) >= 1, "batches", "be one or more numbers of at least 1", list(batches))
    check(rounds >= 1, "rounds", "be at least 1", rounds)
    encoders: dict[str, nn.Module] = {
        DENSE: copy.deepcopy(dense),
        COMPACT: copy.deepcopy(compact),
        DENSE_FAST: accelerate(copy.deepcopy(dense)),
        FAST: accelerate(copy.deepcopy(compact)),
    }
    bare = _without_ffns(dense).eval()
    for encoder in encoders.values():
        encoder.eval()
    neurons = [sum(ffn.intermediate_size for ffn in find_ffns(model)) for model in (dense, compact)]
    fewer = neurons[0] / neurons[1]
    found: dict[str, Any] = {"neurons": neurons, "ffn_ceiling": fewer, "length": length, "batches": {}}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        ids = torch.randint(dense.config.vocab_size, (batch, length), generator=generator)
        x = torch.randn(1, batch * length, dense.config.hidden_size, generator=generator)
        now, jobs = clock("cpu"), {}
        for name, encoder in encoders.items():
            jobs[name] = timed(partial(encoder, input_ids=ids), now, passes=4)
            jobs[f"{name}, FFNs"] = timed(ffn_pass(ffn_units(encoder), x), now, passes=4)
        jobs[WITHOUT] = timed(partial(bare, input_ids=ids), now, passes=4)
        times = {name: median(samples) for name, samples in interleave(jobs, rounds).items()}
        share = max(0.0, 1 - times[WITHOUT] / times[DENSE])
        found["batches"][str(batch)] = {
            "share": share,
            "ceiling": amdahl(share, fewer),
            "encoders": {
                name: {
                    "seconds": times[name],
                    "ratio": times[DENSE] / times[name],
                    "ffn_seconds": times[f"{name}, FFNs"],
                    "ffn_ratio": times[f"{DENSE}, FFNs"] / times[f"{name}, FFNs"],
                }
                for name in encoders
            },
        }
    return found
