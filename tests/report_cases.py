"""Facts for reports, made by hand: small, and with numbers that a reader can follow into the captions."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 4
Values = dict[str, Any]


def summary(mean: float | None, spread: float = 0.1) -> Values:
    interval = None if mean is None else [mean * (1 - spread), mean * (1 + spread)]
    return {"mean": mean, "interval": interval, "median": mean, "p90": mean}


def estimate(value: float, spread: float = 0.05) -> Values:
    return {"value": value, "interval": [value - spread, value + spread]}


def machine() -> Values:
    return {
        "cpu": "A processor",
        "instructions": "AVX2",
        "cores": 2,
        "torch_threads": 2,
        "memory_bytes": 8_000_000_000,
        "load": 0.1,
        "gpu": None,
        "system": "Linux x86_64",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
    }


def _timed(ratio: float, ceiling: float, **value: float) -> Values:
    return {**value, "ratio": ratio, "ceiling": ceiling, "path": "eager"}


def _speeds(ratio: float, ceiling: float) -> Values:
    return {
        "keep": 0.75,
        "decode": {
            "1": _timed(ratio, ceiling, tokens_per_s=20 * ratio),
            "4": _timed(ratio, ceiling, tokens_per_s=60 * ratio),
        },
        "prefill": {"512": _timed(ratio, ceiling, tokens_per_s=900 * ratio)},
        "ffn": {"1": _timed(ratio, ceiling, us=400 / ratio), "512": _timed(ratio, ceiling, us=9000 / ratio)},
    }


def bench() -> Values:
    models = {"dense": _speeds(1.0, 1.0), "pruned": _speeds(1.08, 1.13), "PrunedMLP": _speeds(1.25, 1.13)}
    settings = {"prefill_tokens": 512, "repeats": 5, "dtype": "float32"}
    return {"machine": machine(), "settings": settings, "share": {"decode": {"1": 0.4}}, "models": models}


def results() -> Values:
    layers = [
        {"layer": i, "before": 64, "after": 48, "error_cut": 0.1 * (i + 1), "error_repaired": 0.02}
        for i in range(LAYERS)
    ]
    dense = {"perplexity": 10.0, "file_bytes": 500_000_000, "peak_bytes": 520_000_000, "neurons": 256, "text": "a"}
    pruned = {"perplexity": 12.5, "file_bytes": 400_000_000, "peak_bytes": 420_000_000, "neurons": 192, "text": "b"}
    text = {"tokens": 2048, "window": 256}
    return {
        "model": "Small-1B",
        "keep": 0.75,
        "calibration": {"text": "prose.txt (first half)", **text},
        "evaluation": {"text": "prose.txt (second half)", **text},
        "prune": {"config": {"keep": 0.75, "method": "wanda", "seed": 3}, "layers": layers, "seconds": 5.0},
        "dense": dense,
        "pruned": pruned,
        "bench": bench(),
        "seconds": 60.0,
    }


def _vector(value: float) -> Values:
    return {"cosine": summary(value), "angle": summary(100 * value), "norm": summary(1.0), "orthogonal": summary(value)}


def hierarchy(scale: float = 1.0) -> Values:
    layers = [
        {
            "layer": i,
            "kept": True,
            "hidden": _vector(scale * 0.01 * (i + 1)),
            "ffn": _vector(scale * 0.1),
            "rest": _vector(scale * 0.001 * i),
            "hidden_alone": _vector(scale * 0.002),
            "ffn_alone": _vector(scale * 0.02 * (i + 1)),
        }
        for i in range(LAYERS)
    ]
    names = ("cosine", "kl", "js", "total_variation", "top1", "top5", "entropy", "entropy_pruned")
    keys = ("kl", "change", "change_estimate", "change_bound")
    return {
        "windows": 8,
        "window": 64,
        "layers": layers,
        "perplexity": {"dense": 20.0, "pruned": 30.0, "loss": summary(scale * 0.405)},
        **{name: _vector(scale * value) for name, value in (("embedding", 0.03), ("logits", 0.004), ("centred", 0.04))},
        "probabilities": {name: summary(scale * 0.2) for name in names},
        "amplification": {"exact": 5.0, "estimate": 6.0} if scale else {"exact": None, "estimate": None},
        "temperatures": [{"temperature": t, **dict.fromkeys(keys, scale * 0.5 / t)} for t in (0.5, 1.0, 2.0)],
        "breakdown": [{"estimate": scale * 0.1 * 2**i, "kl": scale * 0.1 * 1.5**i} for i in range(5)],
    }


def drift(temperature: float = 0.0, scale: float = 1.0) -> Values:
    def measures(value: float) -> Values:
        return {
            name: summary(scale * value) for name in ("embedding", "logits", "probabilities", "kl", "total_variation")
        }

    steps = [
        {"step": t, "own": measures(0.1 + 0.05 * t), "fixed": measures(0.1), "local": measures(0.12)}
        for t in range(1, 7)
    ]
    survival = [{"step": t, "mean": 1 - scale * t / 8, "interval": [0.0, 1.0]} for t in range(1, 7)]
    habits = {"length": 6.0, "repetition": 0.25, "distinct1": 0.5, "distinct2": 0.75}
    agreement = {name: summary(0.5) for name in ("overlap1", "overlap2", "overlap3", "overlap4", "edit")}
    text = {"prompt": "Once upon", "dense": " a time there was", "pruned": " a time a time"}
    return {
        "temperature": temperature,
        "prompts": 8,
        "new_tokens": 6,
        "steps": steps,
        "instantaneous": measures(0.1),
        "accumulated": measures(0.3),
        "exposure": measures(0.02),
        "growth": measures(0.0),
        "survival": survival,
        "median_divergence": 4 if scale else None,
        "agreement": agreement,
        "dense": habits,
        "pruned": habits,
        "repetition_difference": summary(0.0),
        "examples": [text],
    }


def metric(dense: float, pruned: float, chance: float | None) -> Values:
    kept = None if chance is None else estimate((pruned - chance) / (dense - chance))
    found = {"dense": estimate(dense), "pruned": estimate(pruned), "difference": estimate(dense - pruned)}
    return {**found, "relative_loss": None, "retained": kept, "chance": chance}


def _task(name: str, kind: str, main: str, dense: float, pruned: float, chance: float) -> Values:
    return {"name": name, "kind": kind, "items": 40, "main": main, "metrics": {main: metric(dense, pruned, chance)}}


def tasks() -> Values:
    def deviation(value: float) -> Values:
        return {
            name: {"mean": value, "interval": [value / 2, 2 * value]} for name in ("cosine", "kl", "total_variation")
        }

    asked = [
        _task("facts", "choice", "accuracy_token", 0.85, 0.79, 0.25),
        {
            **_task("facts, letters", "categorical", "accuracy", 0.65, 0.55, 0.25),
            "deviations": {"restricted": deviation(0.05), "full": deviation(0.2)},
            "top": [],
        },
        _task("written", "generation", "exact", 0.5, 0.2, 0.0),
    ]
    order = {"first": 0.9, "second": 0.4, "difference": estimate(0.5), "facts": 40, "suffers_more": "second"}
    return {"tasks": asked, "orders": [{"tasks": ["facts", "written"], **order}], "shots": 0, "seed": 0}


def diagnose(scale: float = 1.0) -> Values:
    return {
        "dense": "small",
        "pruned": "small-075",
        "text": "prose.txt (second half)",
        "tokens": 512,
        "window": 64,
        "dtype": "float32",
        "parameters": {"dense": 1000, "pruned": 800},
        "provenance": {"config": {"keep": 0.75, "method": "wanda", "structure": "neurons", "seed": 3}, "text": None},
        "budget": {"prompts": 8, "prompt_tokens": 16, "new_tokens": 6, "temperature": 1.0, "items": 40},
        "seed": 0,
        "hierarchy": hierarchy(scale),
        "drift": {"greedy": drift(0.0, scale), "sampled": drift(1.0, scale)},
        "tasks": tasks(),
        "seconds": {"hierarchy": 1.0},
        "machine": machine(),
        "memory": {"model_bytes": 4000, "peak_bytes": 6000},
    }


def _neurons(uniqueness: float, count: int) -> Values:
    return {
        "neurons": count,
        "dead": 2,
        "uniqueness": uniqueness,
        "uniqueness_signed": uniqueness,
        "curve": [
            {"threshold": t, "uniqueness": u} for t, u in ((0.5, uniqueness / 2), (0.8, uniqueness), (0.95, 1.0))
        ],
        "highest": [0] * 10 + [count // 2] * 2 + [0] * 8,
        "sensitivity": {"mean": 0.02, "median": 0.01, "p90": 0.04, "largest": 0.5, "top_tenth": 0.35},
        "clusters": {"count": 3, "neurons": 9, "largest": [{"size": 4, "neurons": [0, 1, 2, 3]}]},
    }


def redundancy() -> Values:
    layers = [{"layer": i, **_neurons(0.9 - 0.1 * i, 64)} for i in range(LAYERS)]
    after = {"wanda": {"uniqueness": 0.7, "sensitivity": 0.95}, "random": {"uniqueness": 0.8, "sensitivity": 0.75}}
    found = {"text": "prose.txt (first half)", "threshold": 0.8, "keep": 0.75, "windows": 8, "window": 64}
    found |= {"layers": layers, "all": _neurons(0.75, 256), "after": after, "machine": machine()}
    return {"model": "/home/somebody/models/small", "model_type": "llama", "ffns": [], "redundancy": found}


def manifest() -> Values:
    files = {"model.safetensors": {"bytes": 400_000_000, "sha256": "0"}, "config.json": {"bytes": 900, "sha256": "1"}}
    return {"format": 1, "model_type": "llama", "widths": [48, 32, 48, 64], "base_fingerprint": "f", "files": files}


def compare() -> Values:
    def row(label: str, group: str, keep: float, value: float) -> Values:
        found = {"label": label, "group": group, "keep": keep, "kept": keep, "prune_seconds": 3.0}
        return {**found, "perplexity": {"one.txt": value, "two.txt": 2 * value}}

    rows = [
        row("pyprune", "ours", 0.7, 30.0),
        row("pyprune", "ours", 0.5, 40.0),
        row("FLAP", "published", 0.7, 38.0),
        row("FLAP", "published", 0.5, 90.0),
        row("magnitude", "published", 0.7, 1e6),
        {"label": "failed", "group": "grid", "keep": 0.7, "error": {"message": "no"}},
    ]
    size = {"tokens": 1024, "window": 128}
    found = {"format": 1, "machine": machine(), "model": "small", "text": "one.txt (first half)", "rows": rows}
    return {
        **found,
        "calibration": size,
        "evaluation": {"one.txt": size, "two.txt": size},
        "dense": {"one.txt": 20.0, "two.txt": 40.0},
    }


def _quantiles(value: float) -> Values:
    return {"p10": 0.9 * value, "p50": value, "p90": 1.1 * value}


def nested() -> Values:
    def row(share: float, prefix: float, own: float | None) -> Values:
        times = {"decode_ms": _quantiles(20 + 20 * share), "prefill_ms": _quantiles(500 * share)}
        return {"share": share, "perplexity": prefix, "perplexity_compensated": own, **times}

    rows = [row(1.0, 20.0, None), row(0.7, 60.0, 30.0), row(0.5, 200.0, 50.0)]
    dense = {"perplexity": 20.0, "decode_ms": _quantiles(45.0), "prefill_ms": _quantiles(520.0)}
    found = {
        "model": "small",
        "method": "wanda",
        "dtype": "float32",
        "evaluation": "one.txt",
        "evaluation_tokens": 1024,
    }
    return {**found, "prefill_tokens": 512, "settings": {}, "machine": machine(), "dense": dense, "rows": rows}


def latency_aware() -> Values:
    def row(target: float, width: int, perplexity: float) -> Values:
        found = {"target": target, "widths": [64, width, width, 64], "keep": (128 + 2 * width) / 256}
        measured = {"promised": target, "measured": 1.02 * target, "measured_spread": _quantiles(1.02 * target)}
        return {**found, **measured, "perplexity": perplexity, "over_plain": 1.1 * target}

    table = {"workload": {"kind": "decode", "tokens": 1, "weights": None}, "sizes": [64] * 4}
    table |= {"widths": [16, 32, 64], "alone": [1e-5, 2e-5, 3e-5]}
    found = {"model": "small", "method": "wanda", "dtype": "float32", "evaluation": "one.txt", "tokens": 1024}
    rows = [row(1.1, 48, 25.0), row(1.3, 16, 45.0)]
    return {**found, "machine": machine(), "dense_perplexity": 20.0, "table": table, "rows": rows}


def recover() -> Values:
    train = [{"step": i, "rate": 1e-4, "loss": 3.0, "ce": 3.5 - 0.01 * i} for i in range(1, 21)]
    held = [{"step": i, "ce": 3.6 - 0.01 * i} for i in (0, 10, 20)]
    found = {"model": "small-075", "text": "one.txt", "steps": 20, "window": 128, "machine": machine()}
    perplexity = {"one.txt, held out": {"before": 36.6, "after": 29.9, "teacher": 25.0}}
    return {**found, "train": train, "held_out": held, "teacher_ce": 3.2, "perplexity": perplexity}


def recover_bench() -> Values:
    values = (("dense", 25.0), ("pruned", 36.6), ("recovered", 29.9))
    models = {name: {"domains": {"one.txt": {"value": v}}} for name, v in values}
    return {"machine": machine(), "model": "demo", "models": models, "recovery": []}


def suite() -> Values:
    def domain(value: float) -> Values:
        size = {"tokens": 1024, "window": 128, "sha256": "0"}
        return {**estimate(value), "source": "a text", **size, "losses": [2.0] * 8}

    def writing(share: float, text: str) -> Values:
        texts = [{"kind": "list", "prompt": f"Prompt {i}", "text": text, "repetition": share} for i in range(4)]
        size = {"prompts": 4, "new_tokens": 16, "chat": True, "distinct2": 0.5, "perplexity": 2.0}
        return {**size, "repetition": estimate(share), "texts": texts}

    def found(scale: float, share: float, text: str) -> Values:
        domains = {"python-docs": domain(10 * scale), "wine": domain(20 * scale**2)}
        piqa = {"items": 40, "chance": 0.5, "accuracy": estimate(0.6), "accuracy_byte": estimate(0.6)}
        mean = {"perplexity": estimate(14.1 * scale**1.5), "missing": ["mathematics"]}
        return {"format": 1, "domains": domains, **mean, "piqa": piqa, "generation": writing(share, text)}

    ratios = {"python-docs": estimate(1.2), "wine": estimate(1.44)}
    against = {"ratios": ratios, "ratio": estimate(1.31), "worst": {"domain": "wine", **ratios["wine"]}}
    against["piqa"] = {name: metric(0.7, 0.66, 0.5) for name in ("accuracy", "accuracy_byte")}
    against["dense"] = {**found(1.0, 0.05, "It is."), "against": None}
    return {"model": "small-075", "machine": machine(), **found(1.2, 0.25, "It is, it is."), "against": against}


FILES = {
    "suite.json": suite,
    "results.json": results,
    "diagnose.json": diagnose,
    "redundancy.json": redundancy,
    "pyprune.json": manifest,
    "bench.json": bench,
    "nested.json": nested,
    "latency-aware.json": latency_aware,
    "compare.json": compare,
    "recover.json": recover,
}


def fill(folder: Path, **files: Values) -> Path:
    """Write facts into a folder; `diagnose=...` becomes `diagnose.json`, underscores hyphens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def fill_all(folder: Path) -> Path:
    """A folder with every file, as the demo lays it out: the manifest in `pruned/`."""
    for name, make in FILES.items():
        where = folder / "pruned" if name == "pyprune.json" else folder
        fill(where, **{name.removesuffix(".json").replace("-", "_"): make()})
    return folder


class Axes:
    """Axes that draw nothing, and refuse what is no number, as `svg.draw` does with those of matplotlib."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Axes:
        if name.startswith("__"):
            raise AttributeError(name)
        return Axes(name)

    def __float__(self) -> float:
        return 0.0

    def __getitem__(self, key: Any) -> Axes:
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        if self._name in ("plot", "bar", "barh", "fill_between", "step", "hlines", "vlines", "axhline", "axvline"):
            for arg in args[:2]:  # a third may be a style
                np.asarray(list(arg) if isinstance(arg, list) else arg, dtype=float)
        found = {"get_ylim": (1e-9, 1e9), "get_legend_handles_labels": ([], [])}
        return found.get(self._name, self)


def undrawn(name: str, label: str, paint: Any, size: Any) -> str:
    """In place of `svg.draw`."""
    paint(Axes())
    return "<svg viewBox='0 0 1 1'></svg>"


def captions(page: str) -> dict[str, str]:
    """Title of each figure -> its caption, as a person reads them."""
    found = re.findall(r"<figure.*?<h3>(.*?)</h3>.*?<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    return {html.unescape(title): html.unescape(caption) for title, caption in found}


def text_of(page: str, tag: str) -> list[str]:
    return [
        html.unescape(re.sub(r"<[^>]+>", "", e)) for e in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    ]


def answer_of(page: str) -> str:
    return html.unescape(re.findall(r'id="answer">(.*?)</p>', page, re.DOTALL)[0])
