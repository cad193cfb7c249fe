"""The verb `bench`: how fast a dense model and its pruned forms run here, beside the ceilings they could reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import machine
from ..base.clock import Job, clock, interleave, median, quantiles, timed
from ..base.errors import check
from ..base.progress import Progress, quiet
from ..ffn.mlp import PrunedMLP
from ..ffn.moe import PrunedMoE
from . import roofline
from .timing import Decode, FFNUnit, Prefill, ffn_pass, ffn_probe, ffn_units

DENSE = "dense"
PATHS = ("eager", "compiled")
# An FFN call on few tokens takes so little that one pass over the layers is a poor sample of it.
_FEW_TOKENS, _PASSES = 64, 8


@dataclass(frozen=True)
class BenchReport:
    """What `benchmark` measured; `to_json` gives these keys.

    `machine`: see `machine.facts`. `settings`: the arguments, and the dense model's dtype, device, layers, D and F.
    `bandwidth_gb_s`: measured read bandwidth; `bandwidth`: how it was measured (see `roofline.Bandwidth`).
    `share`: of the dense model's time that is spent in FFNs, `{"decode": {batch: s}, "prefill": {tokens: s}}`; measured
    inside its forward pass on a CPU, on CUDA as the time of all FFNs alone over the time of a step.
    `models`: by name, the dense model as "dense":

        bytes            of its parameters, tied ones once, and of the scales of int8 weights
        ffn_bytes        of weights that the FFN of one layer must read for a token (mean over layers)
        keep             neurons that it computes for a token, as a share of the dense model's
        decode[batch]    tokens_per_s = batch / median step; step_ms (quantiles p10 .. p90)
        prefill[tokens]  tokens_per_s = tokens / median pass; pass_ms (quantiles)
        ffn[tokens]      us = median per FFN, rotating over all layers; us_quantiles;
                         gb_s = bytes that so many tokens must read / us; share_of_bandwidth

    and in each of the three: `samples` (their number), `path` ("eager" or "compiled": the faster one, whose numbers
    these are), `paths` (median of each path, same unit), `ratio` (dense median / median, each by its own faster path),
    `ceiling`, `share_of_ceiling` = ratio / ceiling.

    The ceiling of an FFN alone is 1/keep: the same bytes (or operations) a second on fewer neurons. Where weights are
    kept in another dtype, it is the ratio of `ffn_bytes` for few tokens, which are bound by bytes. The ceiling of the
    whole model is Amdahl's with that on the FFN's share. A kernel that uses the machine better than the dense path's
    can pass both; `share_of_bandwidth` says how much it leaves.

    Of a mixture, the FFN of a layer is its experts and what stands beside them. Alone, experts get a random routing,
    another in each call; what they must read are the experts that the tokens name, in the mean over such routings, and
    for few tokens ceilings are ratios of these bytes. `settings` then has `experts` and `experts_per_token`.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    bandwidth: roofline.Bandwidth
    share: dict[str, Any]
    models: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "bandwidth_gb_s": self.bandwidth.gb_s,
            "bandwidth": self.bandwidth.to_json(),
            "share": self.share,
            "models": self.models,
        }


def _swapped(model: Any) -> list[Any]:
    """What of a model runs from records."""
    return [module for module in model.modules() if isinstance(module, PrunedMLP | PrunedMoE)]


# model name -> path -> samples in seconds
Samples = dict[str, dict[str, list[float]]]


class _Bench:
    """One run of `benchmark`: what is compared, and how it is timed."""

    def __init__(self, models: dict[str, Any], repeats: int, compiled: bool, progress: Progress) -> None:
        self.models, self.repeats, self.progress = models, repeats, progress
        self.paths = PATHS if compiled else PATHS[:1]
        parameter = next(models[DENSE].parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.units = {name: ffn_units(model) for name, model in models.items()}
        neurons = {name: sum(unit.neurons for unit in units) for name, units in self.units.items()}
        self.kept = {name: count / neurons[DENSE] for name, count in neurons.items()}
        self.generator = torch.Generator().manual_seed(0)

    def costs(self, tokens: int, keep: float | None) -> dict[str, float]:
        """For each model the least that its FFNs cost on `tokens` rows, as a share of the dense model's cost.

        Args:
            tokens: few are bound by bytes of weights, many by operations; these differ where dtypes do.
            keep: of neurons, assumed for every candidate; None for what it computes.
        """
        shares = self.kept if keep is None else {name: 1.0 if name == DENSE else keep for name in self.models}
        if tokens > _FEW_TOKENS:
            return shares
        return {name: share * self._bytes_ratio(name, tokens) for name, share in shares.items()}

    def _bytes_ratio(self, name: str, tokens: int) -> float:
        """Bytes of a neuron over those of a dense one where records have another dtype or there are experts, else 1."""
        records = [m.record for m in _swapped(self.models[name])]
        routed = any(unit.routed for unit in self.units[DENSE])
        if not routed and all(record.dtype == self.dtype for record in records):
            return 1.0
        own, dense = (
            sum(u.read(tokens) for u in self.units[n]) / sum(u.neurons for u in self.units[n]) for n in (name, DENSE)
        )
        return own / dense

    def bytes(self, name: str, tokens: int) -> float:
        """Of weights that the FFNs of one layer must read for so many tokens, mean over layers."""
        units = self.units[name]
        return sum(unit.read(tokens) for unit in units) / len(units)

    def prompt(self, batch: int, tokens: int) -> Tensor:
        """`[batch, tokens]` random token ids."""
        vocabulary = self.models[DENSE].config.vocab_size
        return torch.randint(vocabulary, (batch, tokens), generator=self.generator).to(self.device)

    def dense_facts(self) -> dict[str, Any]:
        """Device, dtype and FFN shape of the dense model."""
        units = self.units[DENSE]
        experts = next((one for unit in units for one in unit.routed), None)
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": len(units),
            "hidden_size": units[0].hidden_size,
            "intermediate_size": max(unit.neurons for unit in units),
            **({} if experts is None else {"experts": experts.experts, "experts_per_token": experts.picked}),
        }

    def model_facts(self, name: str) -> dict[str, Any]:
        """The start of a model's entry in the report: its bytes and neurons, and room for what was timed."""
        model = self.models[name]
        scales = [m.scales for m in _swapped(model) if m.scales is not None]
        return {
            "bytes": sum(t.numel() * t.element_size() for t in [*model.parameters(), *scales]),
            "ffn_bytes": self.bytes(name, 1),
            "keep": self.kept[name],
            "decode": {},
            "prefill": {},
            "ffn": {},
        }

    def run(self, stage: str, jobs: Mapping[tuple[str, str], Job]) -> Samples:
        """Samples of the jobs, keyed by (model, path), run in turn."""
        flat = {f"{name}\0{path}": job for (name, path), job in jobs.items()}
        found = interleave(flat, self.repeats, lambda done, total: self.progress(stage, done, total))
        samples: Samples = {}
        for name, path in jobs:
            samples.setdefault(name, {})[path] = found[f"{name}\0{path}"]
        return samples

    def decode(self, batch: int, prompt_tokens: int, steps: int) -> Samples:
        prompt = self.prompt(batch, prompt_tokens)
        jobs: dict[tuple[str, str], Job] = {
            (name, path): Decode(model, prompt, steps, path == "compiled")
            for name, model in self.models.items()
            for path in self.paths
        }
        return self.run(f"timing decode, batch {batch}", jobs)

    def prefill(self, tokens: int) -> Samples:
        prompt = self.prompt(1, tokens)
        # `generate` compiles the decode step only.
        jobs: dict[tuple[str, str], Job] = {(n, PATHS[0]): Prefill(m, prompt) for n, m in self.models.items()}
        return self.run("timing prefill", jobs)

    def ffn(self, tokens: int) -> Samples:
        passes = _PASSES if tokens <= _FEW_TOKENS else 1
        now = clock(self.device)

        def job(units: Sequence[FFNUnit], path: str) -> Job:
            x = torch.randn(1, tokens, units[0].hidden_size, generator=self.generator)
            run = ffn_pass(units, x.to(self.device, self.dtype), path == "compiled")
            return timed(run, now, passes, share=len(units))

        jobs = {(name, path): job(units, path) for name, units in self.units.items() for path in self.paths}
        return self.run(f"timing FFNs alone, {tokens} tokens", jobs)

    def probed_share(self, job: Job, skip: int) -> float:
        """Median share of FFN time in the forward passes of the dense model that `job` makes, but the first `skip`."""
        job()
        shares: list[float] = []
        for _ in range(self.repeats):
            with ffn_probe(self.models[DENSE]) as found:
                job()
            shares += found[skip:]
        return median(shares)


def _fastest(paths: Mapping[str, Sequence[float]]) -> str:
    return min(paths, key=lambda path: median(paths[path]))


def compare(samples: Samples, costs: Mapping[str, float], share: float, unit: str, scale: float) -> dict[str, Any]:
    """For every model: quantiles of its faster path, its ratio to the dense model's faster path, and the ceiling.

    Args:
        samples: seconds, by model and path; the dense model is among them.
        costs: of each model's FFNs at the least, as a share of the dense model's; 1/cost is the ceiling of FFNs alone.
        share: of the dense time that is spent in FFNs; 1 for FFNs alone.
        unit: name of the quantiles' key.
        scale: of that unit, times a second.
    """
    dense = median(samples[DENSE][_fastest(samples[DENSE])])
    entries = {}
    for name, paths in samples.items():
        path = _fastest(paths)
        ratio = dense / median(paths[path])
        ceiling = roofline.amdahl(share, 1 / costs[name])
        entries[name] = {
            unit: quantiles(paths[path], scale),
            "samples": len(paths[path]),
            "path": path,
            "paths": {p: scale * median(found) for p, found in paths.items()},
            "ratio": ratio,
            "ceiling": ceiling,
            "share_of_ceiling": ratio / ceiling,
        }
    return entries


def _probed_shares(bench: _Bench, batches: Sequence[int], prompt: int, steps: int, prefill: int) -> dict[str, Any]:
    """The FFN's share of the dense model's time, measured inside its forward passes."""
    model, total = bench.models[DENSE], len(batches) + 1
    decode = {}
    for i, batch in enumerate(batches):
        bench.progress("timing FFNs in the model", i, total)
        # The first two forward passes are the prefill and the step that is never timed.
        decode[str(batch)] = bench.probed_share(Decode(model, bench.prompt(batch, prompt), steps), skip=2)
    bench.progress("timing FFNs in the model", total - 1, total)
    return {
        "decode": decode,
        "prefill": {str(prefill): bench.probed_share(Prefill(model, bench.prompt(1, prefill)), skip=0)},
    }


def _derived_shares(
    bench: _Bench, ffn: dict[int, Samples], decode: dict[int, Samples], prefill: dict[int, Samples]
) -> dict[str, Any]:
    """The FFN's share of the dense model's time as the time of all its FFNs alone over that of the model."""

    def share(alone: Samples, whole: Samples) -> float:
        ffns, step = alone[DENSE], whole[DENSE]
        return min(1.0, len(bench.units[DENSE]) * median(ffns[_fastest(ffns)]) / median(step[_fastest(step)]))

    return {
        "decode": {str(batch): share(ffn[batch], samples) for batch, samples in decode.items()},
        "prefill": {str(tokens): share(ffn[tokens], samples) for tokens, samples in prefill.items()},
    }


def _entries(
    bench: _Bench,
    keep: float | None,
    share: dict[str, Any],
    ffn: dict[int, Samples],
    decode: dict[int, Samples],
    prefill: dict[int, Samples],
    bandwidth: roofline.Bandwidth,
) -> dict[str, dict[str, Any]]:
    """The `models` of a report."""
    entries = {name: bench.model_facts(name) for name in bench.models}
    for batch, samples in decode.items():
        costs = bench.costs(batch, keep)
        for name, entry in compare(samples, costs, share["decode"][str(batch)], "step_ms", 1e3).items():
            entries[name]["decode"][str(batch)] = {"tokens_per_s": 1e3 * batch / entry["step_ms"]["p50"], **entry}
    for tokens, samples in prefill.items():
        costs = bench.costs(tokens, keep)
        for name, entry in compare(samples, costs, share["prefill"][str(tokens)], "pass_ms", 1e3).items():
            entries[name]["prefill"][str(tokens)] = {"tokens_per_s": 1e3 * tokens / entry["pass_ms"]["p50"], **entry}
    for tokens, samples in ffn.items():
        for name, entry in compare(samples, bench.costs(tokens, keep), 1.0, "us_quantiles", 1e6).items():
            us = entry["us_quantiles"]["p50"]
            gb_s = bench.bytes(name, tokens) / us / 1e3
            rates = {"us": us, "gb_s": gb_s, "share_of_bandwidth": gb_s / bandwidth.gb_s}
            entries[name]["ffn"][str(tokens)] = {**rates, **entry}
    return entries


def _check(models: dict[str, Any], batches: Sequence[int], prompt: int, steps: int, prefill: int, repeats: int) -> None:
    check(len(models) > 1, "candidates", "hold at least one model", [])
    device = next(models[DENSE].parameters()).device
    for name, model in models.items():
        where = next(model.parameters()).device
        check(not model.training, name, "be in eval mode", "a model in training mode")
        check(where == device, name, f"be on the device of the dense model, {device}", str(where))
    check(len(batches) > 0 and all(b >= 1 for b in batches), "batches", "be one or more positive counts", batches)
    check(prompt >= 1, "prompt_tokens", "be at least 1", prompt)
    check(steps >= 2, "new_tokens", "be at least 2, since the first step is never timed", steps)
    check(repeats >= 1, "repeats", "be at least 1", repeats)
    longest = getattr(models[DENSE].config, "max_position_embeddings", None) or prompt + steps + prefill
    check(prompt + steps <= longest, "prompt_tokens + new_tokens", f"fit in {longest} positions", prompt + steps)
    check(1 <= prefill <= longest, "prefill_tokens", f"lie in [1, {longest}], the model's positions", prefill)


@torch.no_grad()
def benchmark(
    dense: Any,
    candidates: Mapping[str, Any],
    *,
    keep: float | None = None,
    batches: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 32,
    new_tokens: int = 16,
    prefill_tokens: int = 512,
    repeats: int = 5,
    compiled: bool = False,
    progress: Progress = quiet,
) -> BenchReport:
    """Measure decode, prefill and FFN speed of a dense model and of what was made of it, in turn, on one device.

    Args:
        dense: a causal LM of Transformers in eval mode.
        candidates: name -> model in eval mode on the same device: pruned, accelerated (compact or gather), or both.
        keep: share of neurons that the ceilings assume; None counts what each candidate computes, which rounding of
            widths moves off what was asked for.
        batches: sequences decoded at once.
        prompt_tokens, new_tokens: of a decode run; every step but the first is a sample.
        prefill_tokens: of a prefill pass.
        repeats: recorded rounds of every measurement, after one that is not.
        compiled: also run decode steps and FFNs by `torch.compile`, on every model; the faster path counts. Costs a
            compilation per model and batch.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: a value breaks its rule, or models are in training mode or on different devices.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    check(DENSE not in candidates, "candidates", f"not use the name {DENSE!r}", list(candidates))
    check(keep is None or 0 < keep <= 1, "keep", "lie in (0, 1]", keep)
    models = {DENSE: dense, **candidates}
    _check(models, batches, prompt_tokens, new_tokens, prefill_tokens, repeats)
    facts = machine.facts()
    progress("measuring memory bandwidth", 0, 1)
    bench = _Bench(models, repeats, compiled, progress)
    bandwidth = roofline.read_bandwidth(bench.device)

    ffn = {tokens: bench.ffn(tokens) for tokens in sorted({1, *batches, prefill_tokens})}
    decode = {batch: bench.decode(batch, prompt_tokens, new_tokens) for batch in batches}
    prefill = {prefill_tokens: bench.prefill(prefill_tokens)}
    # The probe sits in eager passes; on a GPU it would wait for the device, and in compiled passes it has no place.
    if bench.device.type == "cuda" or compiled:
        share = _derived_shares(bench, ffn, decode, prefill)
    else:
        share = _probed_shares(bench, batches, prompt_tokens, new_tokens, prefill_tokens)
    settings = {
        "keep": keep,
        "batches": list(batches),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens": prefill_tokens,
        "repeats": repeats,
        "paths": list(bench.paths),
        **bench.dense_facts(),
    }
    entries = _entries(bench, keep, share, ffn, decode, prefill, bandwidth)
    return BenchReport(facts, settings, bandwidth, share, entries)
