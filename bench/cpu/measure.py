"""What one case, and one whole model, took: variants in turns with plain reads of memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.cpu.cases import Case
from bench.cpu.goals import Row
from bench.cpu.variants import Arena, Compiler, Variant, variants
from pyprune import accelerate, prune
from pyprune.base.clock import Job, interleave, median, quantiles
from pyprune.base.memory import huge_pages
from pyprune.model.loading import load_model
from pyprune.speed import roofline
from pyprune.speed.benchmark import benchmark

READ_BYTES = 256 << 20
ROUNDS = 6


class Reader:
    """Plain read loops over buffers that no cache holds: the loop that was found best and the native one, on pages of
    4 KB and on huge pages. The fastest of them by the median of its passes is the ceiling.
    """

    def __init__(self, loop: str, size: int) -> None:
        self.bytes = size // (4 * 4096) * 4 * 4096
        pages = huge_pages(self.bytes)
        # Two, so that a cache of one buffer's size is of no help.
        buffers = [
            torch.empty(self.bytes // 4),
            torch.empty(self.bytes // 4) if pages is None else pages.view(torch.float32),
        ]
        loops = [roofline.read_loops(buffer.fill_(1.0).view(-1, 4096)) for buffer in buffers]
        names = [name for name in dict.fromkeys((loop, "native")) if name in loops[0]]
        self._passes = [(name, found[name]) for name in names for found in loops]

    def job(self) -> list[float]:
        """A pass of each loop over each buffer."""
        samples = []
        for _, run in self._passes:
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return samples

    def facts(self, samples: list[float]) -> dict[str, Any]:
        kinds = len(self._passes)
        medians = [median(samples[i::kinds]) for i in range(kinds)]
        best = min(range(kinds), key=medians.__getitem__)
        return {
            "gb_s": self.bytes / medians[best] / 1e9,
            "best_gb_s": self.bytes / min(samples) / 1e9,
            "loop": self._passes[best][0],
            "passes": len(samples) // kinds,
            "buffer_bytes": self.bytes,
        }


def _variant_facts(variant: Variant, samples: list[float], read_gb_s: float) -> dict[str, Any]:
    us = quantiles(samples, 1e6)
    gb_s = variant.bytes / us["p50"] / 1e3
    return {
        "us": us["p50"],
        "us_quantiles": us,
        "samples": len(samples),
        "backend": variant.backend,
        "bytes": variant.bytes,
        "copies": len(variant.copies),
        "gb_s": gb_s,
        "share_of_bandwidth": gb_s / read_gb_s,
    }


def measure(case: Case, arena: Arena, reader: Reader, seconds: float, compiler: Compiler | None = None) -> Row:
    """One case: every variant, about `seconds` each, in turns with the reader."""
    found = variants(case, arena, compiler)
    jobs: dict[str, Job] = {name: variant.job(seconds / ROUNDS) for name, variant in found.items()}
    samples = interleave({**jobs, "read": reader.job}, ROUNDS)
    read = reader.facts(samples["read"])
    facts = {name: _variant_facts(v, samples[name], read["gb_s"]) for name, v in found.items()}
    for entry in facts.values():
        entry["vs_dense"] = facts["dense"]["us"] / entry["us"]
        entry["vs_torch_compact"] = facts.get("torch-compact", facts["dense"])["us"] / entry["us"]
    return {
        "model": case.shape.name,
        "hidden_size": case.shape.hidden_size,
        "intermediate_size": case.shape.intermediate_size,
        "gated": case.shape.gated,
        "dtype": case.dtype,
        "weights": case.weights,
        "tokens": case.tokens,
        "keep": case.neurons / case.shape.intermediate_size,
        "read": read,
        "ceiling_us": found["compact"].bytes / read["gb_s"] / 1e3,
        "variants": facts,
    }


def measure_model(name: str, progress: Callable[[str, int, int], None]) -> tuple[list[Row], dict[str, Any]]:
    """Decode of a whole model at batch 1, stock against accelerated at keep 0.5: a row for each, and the report."""
    dense = load_model(name, "bfloat16", "cpu")
    narrow = copy.deepcopy(dense)
    mask = prune(narrow, 0.5, "random", repair=None).mask
    candidates = {
        weights or "bfloat16": accelerate(copy.deepcopy(dense), mask=mask, weights=weights)
        for weights in (None, "int8", "int4")
    }
    report = benchmark(
        dense, candidates, batches=(1,), new_tokens=32, prefill_tokens=64, repeats=6, progress=progress
    ).to_json()
    share, stock = report["share"]["decode"]["1"], report["models"]["dense"]["decode"]["1"]
    rows = []
    for weights in candidates:
        entry = report["models"][weights]
        value = entry["decode"]["1"]
        rows.append(
            {
                "model": name,
                "weights": weights,
                "keep": entry["keep"],
                "ffn_share": share,
                "dense_tokens_per_s": stock["tokens_per_s"],
                "tokens_per_s": value["tokens_per_s"],
                **{key: value[key] for key in ("ratio", "ceiling", "share_of_ceiling")},
            }
        )
    return rows, report
