"""The shapes of the files that a report reads, as far as it reads them."""

from __future__ import annotations

from typing import Any

from .shape import Shape, anything, at, count, counted, many, maybe, named, number, only, positive, record, text
from .shapes_diagnose import DIAGNOSE, MACHINE, REDUNDANCY, SETTINGS

_TOKENS = record({"ratio": positive, "ceiling": positive, "path": text, "tokens_per_s": positive})
_FFN = record({"ratio": positive, "ceiling": positive, "path": text, "us": positive})
_TIMED = record(
    {
        "decode": counted(_TOKENS, 1),
        "prefill": counted(_TOKENS),
        "ffn": counted(_FFN),
    },
    {"keep": number, "bytes": number},
)
_TIMING = record({}, {"prefill_tokens": count, "repeats": count, "dtype": text, "device": text})


def _bench(place: str, value: Any) -> None:
    share = record({}, {"decode": counted(number)})
    record({"models": named(_TIMED, 1)}, {"machine": MACHINE, "settings": _TIMING, "share": share})(place, value)
    record({"dense": anything})(at(place, "models"), value["models"])
    for name, entry in value["models"].items():
        for kind in ("decode", "prefill", "ffn"):
            missing = value["models"]["dense"][kind].keys() ^ entry[kind].keys()
            only(set())(at(place, f"models.{name}.{kind}") + ", what only one of it and dense has,", missing)


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
            {"config": SETTINGS, "seconds": number},
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
    {"model": text, "text": text, "machine": MACHINE, "calibration": record({"tokens": count, "window": count})},
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
            record(
                {"share": positive, "perplexity": positive, "perplexity_compensated": maybe(positive), **_NESTED_TIMES}
            ),
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
        "machine": MACHINE,
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
        "machine": MACHINE,
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
        "machine": MACHINE,
    },
)
_GOAL = record({"text": text, "dense": positive, "recovered": positive, "ratio": positive})
_RECOVER_BENCH = record(
    {
        "models": named(record({"perplexity": named(positive, 1)}), 2),
        "goal": _GOAL,
        "texts": named(anything, 1),
    },
    {"dense": text, "machine": MACHINE, "seconds": number},
)


def _recover(place: str, value: Any) -> None:
    """As `pyprune recover --json` writes it, or bench/model/recover.py."""
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
    "diagnose.json": DIAGNOSE,
    "redundancy.json": REDUNDANCY,
    "pyprune.json": _MANIFEST,
    "bench.json": _bench,
    "nested.json": _NESTED,
    "latency-aware.json": _latency_aware,
    "compare.json": _compare,
    "recover.json": _recover,
}
