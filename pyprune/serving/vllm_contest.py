"""Which FFNs of a model in vLLM run from a record: timed beside vLLM's layers once, while the model is loaded."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base import reference
from ..base.clock import Job, interleave, median, timed
from ..base.errors import InputError, UnsupportedModelError
from ..base.memory import Room, release
from ..base.record import Record
from ..ffn import first_use, native, tuned
from ..ffn.quantisation import channel_scales, quantise
from .vllm_ffn import RecordFFN, Site, find
from .vllm_options import VllmOptions

# Numbers of tokens that are timed: all that a record must serve, and those that int8 rows may serve beside own layers.
# Each stands for those down to the one before it.
TOKENS, FEW = (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32)
_FASTER, _SLOWER = 0.95, 1.03
_COPY_BYTES = 128 << 20  # of weights that are read in turn, so that they come from memory as in a model's step
_ROUNDS = 5
# How far vLLM's result may lie from a plain FFN's, over its size.
_APART = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

log = logging.getLogger("vllm.pyprune")


@dataclass
class Outcome:
    """How the FFNs of one shape run.

    Attributes:
        way: `own`, `record`, or `beside` for some numbers of tokens.
        times: seconds of one FFN by vLLM's layers and from a record, by tokens; empty where nothing was timed.
    """

    way: str
    times: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def spans(self) -> list[range]:
        """Numbers of tokens for which a record beside vLLM's layers was faster, in runs."""
        found: list[range] = []
        before = 0
        for tokens, (theirs, mine) in self.times.items():
            if mine <= _FASTER * theirs:
                start = found.pop().start if found and found[-1].stop == before + 1 else before + 1
                found.append(range(start, tokens + 1))
            before = tokens
        return found

    @property
    def slower(self) -> list[int]:
        """Numbers of tokens, of those timed, for which a record was slower than vLLM's layers."""
        return [tokens for tokens, (theirs, mine) in self.times.items() if mine > _SLOWER * theirs]

    def __str__(self) -> str:
        few = ", ".join(f"{span.start} to {span[-1]}" for span in self.spans)
        told = {"own": "vLLM's layers", "record": "a record", "beside": f"int8 rows for {few} tokens"}[self.way]
        timed = (f"{1e6 * b:.0f} us against vLLM's {1e6 * a:.0f} for {m}" for m, (a, b) in self.times.items())
        return f"{told} ({'; '.join(timed) or 'as asked'})"


def _race(
    own: Sequence[Any], records: Sequence[RecordFFN], dtype: torch.dtype, tokens: int, backend: str
) -> tuple[float, float]:
    """Median seconds of one FFN for so many tokens: by vLLM's layers, and from a record.

    Of vLLM's FFN the layers alone count, for it fuses what lies between with other work where it compiles.
    """
    x, *between = (
        torch.randn(tokens, size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
        for size in (records[0].hidden_size, *(len(record.rows) for record in records))
    )

    def by_own() -> None:
        for module, hidden in zip(own, between, strict=True):
            module.gate_up_proj(x)
            module.down_proj(hidden)

    def by_record() -> None:
        for record in records:
            record.by_record(x, backend)

    now, share = time.perf_counter, len(own)
    jobs: dict[str, Job] = {"own": timed(by_own, now, share=share), "record": timed(by_record, now, share=share)}
    samples = interleave(jobs, _ROUNDS)
    return median(samples["own"]), median(samples["record"])


def _check_plain(site: Site, record: Record) -> str | None:
    """Why vLLM's FFN, whose weights are packed, is not the one in the record; None where it is."""
    dtype, activation = record.rows.dtype, site.module.act_fn
    x = torch.randn(4, record.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    method = getattr(activation, "_forward_method", None)
    if method is not None:  # vLLM may have it compiled at the first call outside of a model
        activation._forward_method = activation.forward_native
    found = site.module(x).double()
    if method is not None:
        activation._forward_method = method
    wanted = reference.ffn(x, record).double()
    apart = float((found - wanted).norm() / wanted.norm())
    return None if apart <= _APART[dtype] else f"{site.name} computes something else, {apart:.2g} from a plain FFN"


class _Group:
    """FFNs of about one shape, which run one way."""

    def __init__(self, sites: list[Site], weights: torch.dtype | None) -> None:
        self.sites, self.dtype = sites, sites[0].weight.dtype
        self.weights = weights or self.dtype
        sizes = [3 * site.weight.numel() * self.weights.itemsize for site in sites]
        self.room = Room(sum(map(Room.rounded, sizes)))
        self.problem = sites[0].problem(self.weights)
        self.sample = min(len(sites), -(-_COPY_BYTES // max(sizes[0], 1)))
        # With what their results are multiplied by.
        self.records: dict[str, tuple[Record, Tensor | None]] = {}

    def record(self, site: Site) -> tuple[Record, Tensor | None]:
        if site.name not in self.records:
            made, channels = site.record(), None
            if self.weights == torch.int8:
                channels = channel_scales(made.rows[:, -made.hidden_size :])
                made.rows[:, -made.hidden_size :] /= channels
                rows, scales = quantise(made.rows, 3)
                bias = None if made.down_bias is None else made.down_bias / channels
                made = dataclasses.replace(made, rows=rows, scales=scales, down_bias=bias)
            self.records[site.name] = dataclasses.replace(made, rows=self.room.keep(made.rows)), channels
        return self.records[site.name]

    def ours(self) -> list[RecordFFN]:
        """Those of the records that are there."""
        return [RecordFFN(record, self.dtype, channels) for record, channels in self.records.values()]

    def decide(self, options: VllmOptions) -> Outcome:
        """Time both, unless `options` say who runs.

        Raises:
            UnsupportedModelError: kernels are forced, and vLLM's FFN is not what a record computes.
        """
        forced = options.kernels == "on"
        first = self.sites[: self.sample]
        plain = first[0].record()
        for site in first:
            self.record(site)
            site.finish()
        ours = self.ours()
        if reason := _check_plain(first[0], plain):
            if forced:
                raise UnsupportedModelError(f"kernels 'on' cannot be had: {reason}")
            log.info("%s", reason)
            return Outcome("own")
        del plain
        own = [site.module for site in first]
        if forced:
            return self._everywhere(own)
        return self._beside(own, ours) if self.weights == torch.int8 else self._instead(own, ours)

    def _everywhere(self, own: Sequence[Any]) -> Outcome:
        """A record, whatever that costs; which is said."""
        first_use.measure([self.problem])
        ours = self.ours()
        return Outcome("record", {tokens: _race(own, ours, self.dtype, tokens, "auto") for tokens in TOKENS})

    def _beside(self, own: Sequence[Any], ours: Sequence[RecordFFN]) -> Outcome:
        found = Outcome("own", {tokens: _race(own, ours, self.dtype, tokens, "cpu") for tokens in FEW})
        if found.spans:
            found.way = "beside"
        return found

    def _instead(self, own: Sequence[Any], ours: Sequence[RecordFFN]) -> Outcome:
        found = Outcome("own")
        for tokens in TOKENS:
            if tokens == TOKENS[1]:
                first_use.measure([self.problem])
                ours = self.ours()
            found.times[tokens] = theirs, mine = _race(own, ours, self.dtype, tokens, "cpu" if tokens == 1 else "auto")
            if mine > (_FASTER if tokens == TOKENS[0] else _SLOWER) * theirs:
                return found
        found.way = "record"
        return found

    def install(self, model: nn.Module, outcome: Outcome) -> None:
        """Put records in the place of vLLM's FFNs, which are freed unless they run beside them."""
        served = {tokens for span in outcome.spans for tokens in span}
        while self.sites and outcome.way != "own":
            site = self.sites.pop()
            own = site.module if outcome.way == "beside" else None
            record, channels = self.record(site)
            made = RecordFFN(record, self.dtype, channels, own, served)
            if own is None:
                site.free()
            parent, _, name = site.name.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
            del self.records[site.name], site, own, record
            release()


@torch.no_grad()
def take_over(model: nn.Module, options: VllmOptions) -> dict[str, Outcome]:
    """Decide for each shape of FFN who computes it, and put records in the place of vLLM's where these do.

    Args:
        model: of vLLM, loaded, its weights not packed yet.
        options: what the user asked for.

    Returns:
        What was decided, by the shape in words.

    Raises:
        InputError: kernels are forced, and cannot be had.
        UnsupportedModelError: see `_Group.decide`.
    """
    if options.kernels == "off":
        return {}
    sites = find(model)
    reason = native.load() if sites else "no FFN in vLLM's own classes has whole, unquantised weights on a CPU"
    if reason:
        if options.kernels == "on" or options.weights:
            raise InputError(f"kernels of pyprune cannot run in this vLLM: {reason}")
        log.debug("vLLM's layers run all FFNs: %s", reason)
        return {}
    weights = torch.int8 if options.weights else None
    groups: dict[str, list[Site]] = {}
    for site in sites:
        bias = " with biases" if site.module.gate_up_proj.bias is not None else ""
        groups.setdefault(tuned.key(site.problem(weights or site.weight.dtype)) + bias, []).append(site)
    del sites
    found = {}
    for name in list(groups):
        group = _Group(groups.pop(name), weights)
        count = len(group.sites)
        found[name] = group.decide(options)
        group.install(model, found[name])
        log.info("%d FFNs (%s) run by %s", count, name, found[name])
        if found[name].way == "record" and (slower := found[name].slower):
            many = ", ".join(map(str, slower))
            log.warning("kernels 'on' costs time: %s is slower than vLLM's layers for %s tokens", name, many)
    return found
