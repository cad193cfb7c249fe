"""`pyprune tune`: what is fastest on this machine, written into the user's table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base import reference
from ..base.errors import check, check_choice
from ..model import families
from ..model.experts import Bank
from ..model.units import OWN, Expert, groups
from . import contest, contest_experts, native, tuned
from .accelerate_experts import described, picked, why_not
from .backends import Problem
from .contest import Effort, Tuned
from .quantisation import check_width, name_of

MODES = ("compact", "gather")
# Tokens that are timed unless others are asked for: on a CPU the question is where torch begins to be faster.
TOKENS = {"cpu": tuple(m for m in tuned.TOKENS if m <= 512), "cuda": tuned.TOKENS}


class _OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class TuneReport:
    """What `tune` did: `tuned`, `skipped` keys that the table had already, `left` keys for which there was no time, and
    the `path` of the table.
    """

    path: Path
    tuned: list[Tuned] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the table's name without its folder."""
        outcomes = [one.to_json() for one in self.tuned]
        return {"table": self.path.name, "tuned": outcomes, "skipped": self.skipped, "left": self.left}


def layer_problems(
    hidden_size: int,
    intermediate_size: int,
    *,
    gated: bool,
    activation: str,
    dtype: torch.dtype,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    mode: str = "compact",
    keep: float = 1.0,
    tokens: Iterable[int] | None = None,
) -> list[Problem]:
    """The problems of one layer, one for each number of tokens.

    Args:
        hidden_size: D.
        intermediate_size: F, before `keep`.
        gated, activation: the FFN.
        dtype: of x.
        weights: of the record; None for that of x.
        device: `cpu` or `cuda`.
        mode: one of `MODES`.
        keep: share of the neurons that is used, in (0, 1].
        tokens: numbers of tokens; None for `TOKENS`.

    Raises:
        InputError: a number that is out of range, or an unknown name.
    """
    check(hidden_size >= 1, "hidden_size", "be at least 1", hidden_size)
    check(intermediate_size >= 1, "intermediate_size", "be at least 1", intermediate_size)
    check_width(hidden_size, weights)
    check(0 < keep <= 1, "keep", "be in (0, 1]", keep)
    check_choice(activation, "activation", reference.ACTIVATIONS)
    check_choice(mode, "mode", MODES)
    check_choice(device, "device", TOKENS)
    numbers = TOKENS[device] if tokens is None else tuple(tokens)
    check(len(numbers) > 0 and min(numbers) >= 1, "tokens", "be one or more numbers of at least 1", numbers)
    kept = max(1, round(keep * intermediate_size))
    size = kept if mode == "compact" else intermediate_size
    form = (gated, mode == "gather", activation, weights)
    return [Problem(device, dtype, m, hidden_size, size, kept, *form) for m in numbers]


def model_problems(model: nn.Module, **options: Any) -> list[Problem]:
    """The problems of all FFNs of a model, and on a GPU of its experts; `options` are those of `layer_problems`.

    On a CPU the first `accelerate` of a mixture measures its experts.

    Raises:
        InputError: as `layer_problems`.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    found: list[Problem] = []
    ffns = families.find_ffns(model)
    for group in groups(ffns):
        if isinstance(group[0], Expert) and options.get("device") == "cuda":
            found += _expert_problems(model, group[0].of_bank, **options)
    for ffn in ffns:
        if ffn.activation == OWN:
            continue  # it will run as it is
        own: dict[str, Any] = {"gated": ffn.gated, "activation": ffn.activation, "dtype": ffn.weights().down.dtype}
        found += layer_problems(ffn.hidden_size, ffn.intermediate_size, **own, **options)
    return found


def _expert_problems(model: nn.Module, bank: Bank, **options: Any) -> list[Problem]:
    """Those of a layer's experts; none where they cannot run from records."""
    weights = None if options.get("weights") is None else name_of(options["weights"])
    if why_not(bank, "torch", weights) is not None:
        return []
    experts, dtype = described(bank, weights)
    form: dict[str, Any] = {"gated": experts.gated, "activation": experts.activation, "dtype": dtype}
    one = layer_problems(experts.hidden_size, experts.neurons, **form, **options)
    count, of_token = len(experts.rows), picked(model, len(experts.rows))
    return [dataclasses.replace(problem, experts=count, picked=of_token) for problem in one]


def tune(
    problems: Iterable[Problem],
    budget: float = 300.0,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    effort: Effort | None = None,
) -> TuneReport:
    """Time the problems, those of few tokens first, and write the best of each into the user's table as it is found.

    A later call goes on where this one stopped. Each candidate's result is compared with float64 before it is timed. On
    a machine with different GPUs, tune with the one that will run as the current device: choices are kept for a type of
    device, as it was found there.

    Args:
        problems: all on one device; those that share a bucket are timed once, by their representative.
        budget: seconds after which no other candidate is begun; what is not finished by then is left.
        again: time also what the table has.
        progress: called as `(stage, done, total)`.
        effort: how well each is timed; None for `contest.CAREFUL`.

    Raises:
        InputError: no problem, problems of two devices, a device or a PYPRUNE_CPU_ISA that is not here, or no time.
        BackendError: no backend computes a problem rightly.
    """
    chosen = {tuned.key(p): tuned.representative(p) for p in problems}
    devices = sorted({p.device for p in chosen.values()})
    check(len(devices) == 1, "problems", "be on one device", devices)
    check(budget > 0, "budget", "be more than 0 seconds", budget)
    native.check_isa()
    device, deadline = devices[0], time.monotonic() + budget

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise _OutOfTimeError

    report = TuneReport(tuned.path(device))
    waiting = sorted(chosen, key=lambda name: chosen[name].tokens)  # stable: layers in the order of the model
    known = tuned.known(device)
    for done, name in enumerate(waiting):
        if progress:
            progress("problems timed", done, len(waiting))
        if name in known and not again:
            report.skipped.append(name)
            continue
        try:
            check_time()
            race = contest_experts.try_all if chosen[name].experts else contest.try_all
            outcome = race(chosen[name], check_time, effort)
        except _OutOfTimeError:
            report.left.append(name)
            continue
        tuned.store(device, {name: outcome.entries})
        report.tuned.append(outcome)
    tuned.reload()
    return report
