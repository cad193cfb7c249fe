"""The shapes of what `pyprune diagnose` and `pyprune inspect --redundancy` write, as far as a report reads them."""

from __future__ import annotations

from typing import Any

from .shape import Shape, anything, at, count, flag, many, maybe, named, number, pair, positive, record, text

_SUMMARY = record({"mean": maybe(number)}, {"interval": maybe(pair)})
_ESTIMATE = record({"value": number, "interval": pair})

# Of `machine.facts`, and of a `PruneConfig`.
MACHINE = record(
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

SETTINGS = record({}, {"keep": maybe(number), "method": text, "allocation": text, "compensate": text})

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
            record(dict.fromkeys(("temperature", "kl", "change", "change_estimate", "change_bound"), number))
        ),
        "breakdown": many(record({"estimate": number, "kl": number})),
    }
)

_MEASURES = record(dict.fromkeys(("embedding", "logits", "probabilities", "kl"), _SUMMARY))
_HABITS = record(dict.fromkeys(("length", "repetition", "distinct1", "distinct2"), number))
_DRIFT = record(
    {
        "temperature": number,
        "prompts": count,
        "new_tokens": count,
        "steps": many(record({"step": count, "own": _MEASURES, "fixed": _MEASURES, "local": _MEASURES}), 1),
        "instantaneous": _MEASURES,
        "accumulated": _MEASURES,
        "exposure": _MEASURES,
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

DIAGNOSE = record(
    {"dense": text, "pruned": text, "text": text, "tokens": count, "window": count},
    {
        "dtype": text,
        "parameters": record({"dense": positive, "pruned": positive}),
        "provenance": maybe(record({}, {"config": SETTINGS, "model": text, "text": maybe(text)})),
        "budget": record({}, {"items": maybe(count), "temperature": number}),
        "seed": count,
        "hierarchy": _HIERARCHY,
        "drift": record({}, {"greedy": _DRIFT, "sampled": _DRIFT}),
        "tasks": _TASKS,
        "seconds": named(number),
        "machine": MACHINE,
        "memory": record({"model_bytes": positive, "peak_bytes": number}),
    },
)

_CURVE = many(record({"threshold": number, "uniqueness": number}), 1)
_SPREAD = record(dict.fromkeys(("mean", "median", "p90", "largest", "top_tenth"), number))
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
REDUNDANCY = record(
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
            {"machine": MACHINE},
        ),
    }
)
