"""The shapes of the files that a report reads, as far as it reads them."""

from __future__ import annotations

from typing import Any

from .shape import Shape, anything, at, count, flag, many, maybe, named, number, only, pair, positive, record, text

_SUMMARY = record({"mean": maybe(number)}, {"interval": maybe(pair)})
_ESTIMATE = record({"value": number, "interval": pair})
_BY_COUNT = {"key": str.isdecimal, "rule": "be a number of tokens or sequences"}

_MACHINE = record(
    {},
    {
        "cpu": text,
        "instructions": text,
        "cores": count,
        "torch_threads": count,
        "memory_bytes": count,
        "load": number,
        "gpu": maybe(record({"name": text}, {"memory_bytes": count})),
        "system": text,
        "versions": named(maybe(text)),
        "commit": maybe(text),
        "dirty": maybe(flag),
        "date": text,
    },
)

_TOKENS = record({"ratio": positive, "ceiling": positive, "path": text, "tokens_per_s": positive})
_FFN = record({"ratio": positive, "ceiling": positive, "path": text, "us": positive})
_TIMED = record(
    {
        "decode": named(_TOKENS, 1, **_BY_COUNT),
        "prefill": named(_TOKENS, **_BY_COUNT),
        "ffn": named(_FFN, **_BY_COUNT),
    },
    {"keep": number, "bytes": number},
)
_TIMING = record({}, {"prefill_tokens": count, "repeats": count, "dtype": text, "device": text})


def _bench(place: str, value: Any) -> None:
    share = record({}, {"decode": named(number, **_BY_COUNT)})
    record({"models": named(_TIMED, 1)}, {"machine": _MACHINE, "settings": _TIMING, "share": share})(place, value)
    record({"dense": anything})(at(place, "models"), value["models"])
    for name, entry in value["models"].items():
        for kind in ("decode", "prefill", "ffn"):
            missing = value["models"]["dense"][kind].keys() ^ entry[kind].keys()
            only(set())(at(place, f"models.{name}.{kind}") + ", what only one of it and dense has,", missing)


_SETTINGS = record({}, {"keep": maybe(number), "method": text, "allocation": text, "compensate": text})

_RESULTS = record(
    {
        "model": text,
        "keep": number,
        "evaluation": record({"text": text, "tokens": count, "window": count}),
        "prune": record(
            {
                "layers": many(
                    record(
                        {"layer": count, "before": count, "after": count},
                        {"error_cut": maybe(number), "error_repaired": maybe(number)},
                    ),
                    1,
                )
            },
            {"config": _SETTINGS, "seconds": number},
        ),
        **dict.fromkeys(
            ("dense", "pruned"),
            record(
                {"perplexity": positive, "file_bytes": count, "neurons": count}, {"peak_bytes": count, "text": text}
            ),
        ),
        "bench": _bench,
    },
    {"calibration": record({"text": text, "tokens": count, "window": count}), "seconds": number},
)

_VECTOR = record({"cosine": _SUMMARY}, {"angle": _SUMMARY, "norm": _SUMMARY, "orthogonal": _SUMMARY})
_LAYER = record(
    {"layer": count, "kept": flag},
    dict.fromkeys(("hidden", "ffn", "rest", "hidden_alone", "ffn_alone"), _VECTOR),
)
_HIERARCHY = record(
    {
        "windows": count,
        "window": count,
        "layers": many(_LAYER, 1),
        "perplexity": record({"dense": maybe(positive), "pruned": maybe(positive)}, {"loss": _SUMMARY}),
        "embedding": _VECTOR,
        "logits": _VECTOR,
        "centred": _VECTOR,
        "probabilities": record(
            dict.fromkeys(("cosine", "kl", "js", "total_variation", "top1", "top5", "entropy"), _SUMMARY),
            {"entropy_pruned": _SUMMARY},
        ),
        "amplification": record({"exact": maybe(number), "estimate": maybe(number)}),
        "temperatures": many(
            record({name: number for name in ("temperature", "kl", "change", "change_estimate", "change_bound")})
        ),
        "breakdown": many(record({"estimate": number, "kl": number})),
    }
)

_MEASURES = record(dict.fromkeys(("embedding", "logits", "probabilities", "kl"), _SUMMARY))
_HABITS = record({name: number for name in ("length", "repetition", "distinct1", "distinct2")})
_DRIFT = record(
    {
        "temperature": number,
        "prompts": count,
        "new_tokens": count,
        "steps": many(record({"step": count, "own": _MEASURES, "fixed": _MEASURES}), 1),
        "instantaneous": _MEASURES,
        "accumulated": _MEASURES,
        "survival": many(record({"step": count, "mean": number}, {"interval": maybe(pair)}), 1),
        "median_divergence": maybe(count),
        "agreement": record(dict.fromkeys(("overlap1", "overlap2", "overlap4", "edit"), _SUMMARY)),
        "dense": _HABITS,
        "pruned": _HABITS,
        "repetition_difference": _SUMMARY,
    },
    {"examples": many(record({"prompt": text, "dense": text, "pruned": text}))},
)

_METRIC = record(
    {"dense": _ESTIMATE},
    {
        **dict.fromkeys(("pruned", "difference", "relative_loss", "retained"), maybe(_ESTIMATE)),
        "chance": maybe(number),
    },
)
_DEVIATIONS = named(record({"mean": number}, {"interval": maybe(pair)}))


def _task(place: str, value: Any) -> None:
    record(
        {"name": text, "kind": text, "items": count, "main": text, "metrics": named(_METRIC, 1)},
        {"deviations": named(_DEVIATIONS)},
    )(place, value)
    record({value["main"]: anything})(at(place, "metrics"), value["metrics"])


_TASKS = record(
    {"tasks": many(_task)},
    {
        "orders": many(
            record(
                {
                    "tasks": many(text, 2),
                    "first": number,
                    "second": number,
                    "difference": _ESTIMATE,
                    "facts": count,
                    "suffers_more": text,
                }
            )
        ),
        "shots": count,
        "seed": count,
    },
)

_DIAGNOSE = record(
    {"dense": text, "pruned": text, "text": text, "tokens": count, "window": count},
    {
        "dtype": text,
        "parameters": record({"dense": positive, "pruned": positive}),
        "provenance": maybe(record({}, {"config": _SETTINGS, "model": text, "text": maybe(text)})),
        "budget": record({}, {"items": maybe(count), "temperature": number}),
        "seed": count,
        "hierarchy": _HIERARCHY,
        "drift": record({}, {"greedy": _DRIFT, "sampled": _DRIFT}),
        "tasks": _TASKS,
        "seconds": named(number),
        "machine": _MACHINE,
        "memory": record({"model_bytes": positive, "peak_bytes": number}),
    },
)

_CURVE = many(record({"threshold": number, "uniqueness": number}), 1)
_SPREAD = record({name: number for name in ("mean", "median", "p90", "largest", "top_tenth")})
_CLUSTERS = record({"count": count, "neurons": count})
_NEURONS: dict[str, Shape] = {
    "neurons": count,
    "dead": count,
    "uniqueness": number,
    "curve": _CURVE,
    "highest": many(count, 1),
    "sensitivity": _SPREAD,
    "clusters": _CLUSTERS,
}
_REDUNDANCY = record(
    {
        "model": text,
        "redundancy": record(
            {
                "text": text,
                "threshold": number,
                "keep": number,
                "windows": count,
                "window": count,
                "layers": many(record({"layer": count, **_NEURONS}), 1),
                "all": record(_NEURONS),
                "after": named(record({"uniqueness": number, "sensitivity": number})),
            },
            {"machine": _MACHINE},
        ),
    }
)

# Of a checkpoint; `checkpoint.verify` checks the rest.
_MANIFEST = record(
    {
        "format": only(1),
        "model_type": text,
        "widths": many(count, 1),
        "files": named(record({"bytes": count})),
    },
    {"base_fingerprint": text},
)

_COMPARE = record(
    {
        "format": only(1),
        "evaluation": named(record({"tokens": count, "window": count}), 1),
        "dense": named(positive, 1),
        "rows": many(record({"label": text, "group": text, "keep": number})),
    },
    {"model": text, "text": text, "machine": _MACHINE, "calibration": record({"tokens": count, "window": count})},
)
_COMPARED = record({"kept": number, "perplexity": named(positive), "prune_seconds": number})


def _compare(place: str, value: Any) -> None:
    _COMPARE(place, value)
    texts = dict.fromkeys(value["evaluation"], positive)
    record(texts)(at(place, "dense"), value["dense"])
    for i, row in enumerate(value["rows"]):
        if "error" not in row:
            _COMPARED(at(place, f"rows[{i}]"), row)
            record(texts)(at(place, f"rows[{i}].perplexity"), row["perplexity"])


_QUANTILES = record({"p50": positive}, {"p10": positive, "p90": positive})
_NESTED_TIMES = {"decode_ms": _QUANTILES, "prefill_ms": _QUANTILES}
_NESTED = record(
    {
        "model": text,
        "dense": record({"perplexity": positive, **_NESTED_TIMES}),
        "rows": many(
            record({"share": positive, "perplexity": positive, "perplexity_compensated": maybe(positive), **_NESTED_TIMES}),
            1,
        ),
    },
    {
        "dtype": text,
        "method": text,
        "evaluation": text,
        "evaluation_tokens": count,
        "prefill_tokens": count,
        "settings": anything,
        "machine": _MACHINE,
    },
)

_LATENCY = record(
    {
        "model": text,
        "dense_perplexity": positive,
        "rows": many(
            record(
                {
                    "target": positive,
                    "widths": many(count, 1),
                    "keep": number,
                    "perplexity": positive,
                    "promised": positive,
                    "measured": positive,
                },
                {"measured_spread": _QUANTILES, "over_plain": positive},
            ),
            1,
        ),
        "table": record(
            {
                "workload": record({"kind": text, "tokens": count}, {"weights": maybe(text)}),
                "widths": many(count, 2),
                "alone": many(positive, 2),
            },
            {"sizes": many(count), "step": positive, "plain": positive},
        ),
    },
    {
        "dtype": text,
        "method": text,
        "calibration": text,
        "evaluation": text,
        "tokens": count,
        "evaluation_tokens": count,
        "window": count,
        "machine": _MACHINE,
    },
)


def _latency_aware(place: str, value: Any) -> None:
    _LATENCY(place, value)
    sizes = [len(value["table"][name]) for name in ("widths", "alone")]
    only(sizes[0])(at(place, "table.alone, its length,"), sizes[1])


_TAUGHT = record({"before": positive, "after": positive, "teacher": positive})
_RECOVER = record(
    {"perplexity": named(_TAUGHT, 1), "train": many(record({"step": count, "loss": number, "ce": number}))},
    {
        "model": text,
        "text": text,
        "held_out": many(record({"step": count, "ce": number})),
        "teacher_ce": maybe(number),
        "steps": count,
        "tokens": count,
        "window": count,
        "seconds": number,
        "best": count,
        "config": anything,
        "machine": _MACHINE,
    },
)
_GOAL = record({"text": text, "dense": positive, "recovered": positive, "ratio": positive})
_RECOVER_BENCH = record(
    {
        "models": named(record({"perplexity": named(positive, 1)}), 2),
        "goal": _GOAL,
        "texts": named(anything, 1),
    },
    {"dense": text, "machine": _MACHINE, "seconds": number},
)


def _recover(place: str, value: Any) -> None:
    """As `pyprune recover --json` writes it, or bench/bench_recover.py."""
    if isinstance(value, dict) and "models" in value:
        _RECOVER_BENCH(place, value)
        three = dict.fromkeys(("dense", "pruned", "recovered"), anything)
        record(three)(at(place, "models"), value["models"])
        for name, entry in value["models"].items():
            record(dict.fromkeys(value["texts"], anything))(at(place, f"models.{name}.perplexity"), entry["perplexity"])
        return
    _RECOVER(place, value)


# file name -> its shape; the order of the report's own list of files
SHAPES: dict[str, Shape] = {
    "results.json": _RESULTS,
    "diagnose.json": _DIAGNOSE,
    "redundancy.json": _REDUNDANCY,
    "pyprune.json": _MANIFEST,
    "bench.json": _bench,
    "nested.json": _NESTED,
    "latency-aware.json": _latency_aware,
    "compare.json": _compare,
    "recover.json": _recover,
}
