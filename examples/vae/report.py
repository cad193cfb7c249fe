"""All runs -> one JSON object, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pyprune.cli.screen import table

from .data import Data
from .experiment import AFTER, RECOVERED, Plan, Row, Run
from .measure import Measured, interval
from .pruning import EMA, LAST, ONCE, SCORES, WAYS, Way

DENSE = "dense, as long"
_QUANTITIES: dict[str, Callable[[Measured], Tensor]] = {
    "elbo": lambda m: m.elbo,
    "reconstruction": lambda m: m.reconstruction,
    "kl": lambda m: m.kl,
}


def _stage(measured: Sequence[Measured]) -> dict[str, Any]:
    """One model at one moment over all seeds: nats a string with intervals, and what says whether z is used."""
    return {
        **{name: interval(torch.stack([of(m) for m in measured])) for name, of in _QUANTITIES.items()},
        "elbo_of_seeds": [float(m.elbo.mean()) for m in measured],
        "shuffled": fmean(m.shuffled for m in measured),
        "active": fmean(m.active for m in measured),
    }


def _more(a: Sequence[Measured], b: Sequence[Measured]) -> dict[str, float]:
    """How much higher the ELBO of `a` is than that of `b`, nats a string, paired by seed and string."""
    return interval(torch.stack([x.elbo - y.elbo for x, y in zip(a, b, strict=True)]))


def _moments(rows: Sequence[Row]) -> dict[str, list[Measured]]:
    return {AFTER: [row.after for row in rows], RECOVERED: [row.recovered for row in rows]}


def _comparisons(rows: dict[str, dict[str, list[Measured]]]) -> Iterator[dict[str, Any]]:
    """The EMA of each score against everything that is not an EMA on the schedule."""
    for score in SCORES:
        others = [Way(score, LAST), Way(score, ONCE), Way("random")]
        for other in others:
            for moment, own in rows[Way(score, EMA).name].items():
                yield {"score": score, "against": other.name, "when": moment, **_more(own, rows[other.name][moment])}


def result(runs: Sequence[Run], plan: Plan, data: Data) -> dict[str, Any]:
    """Everything measured, as plain JSON values; nats are of a string of `plan.sizes.length` bytes."""
    dense = _moments([run.dense for run in runs])
    rows = {way.name: _moments([run.rows[way.name] for run in runs]) for way in WAYS}
    widths = {way.name: [list(run.rows[way.name].widths) for run in runs] for way in WAYS}
    return {
        "plan": asdict(plan),
        "text": data.name,
        "held_out": {"strings": len(data.held_out), "length": plan.sizes.length},
        "before": _stage([run.before for run in runs]),
        "dense": {moment: _stage(measured) for moment, measured in dense.items()},
        "rows": {
            name: {
                "widths": widths[name],
                **{
                    moment: {**_stage(measured), "lost": _more(dense[moment], measured)}
                    for moment, measured in moments.items()
                },
            }
            for name, moments in rows.items()
        },
        "comparisons": list(_comparisons(rows)),
    }


def _bounds(value: dict[str, float]) -> str:
    return f"{value['value']:+.2f} \\[{value['low']:+.2f}, {value['high']:+.2f}]"


def _cells(stage: dict[str, Any]) -> list[str]:
    return [f"{stage[name]['value']:.2f}" for name in _QUANTITIES]


def tables(found: dict[str, Any]) -> list[Table | str]:
    """What `result` gave, with `speed` and `seconds` where they are there, for people."""
    length = found["held_out"]["length"]
    keep, seeds = found["plan"]["keep"], found["plan"]["seeds"]
    columns = ("encoder", ">ELBO", ">reconstruction", ">KL", ">nats a byte", ">lost to dense, 95 %")

    def line(name: str, stage: dict[str, Any]) -> list[str]:
        lost = _bounds(stage["lost"]) if "lost" in stage else ""
        return [name, *_cells(stage), f"{-stage['elbo']['value'] / length:.3f}", lost]

    before = found["before"]
    stages = [("before pruning", [line("dense", before)])]
    for moment in (AFTER, RECOVERED):
        # The dense model is not cut; it trains as many steps.
        own = [line(name, row[moment]) for name, row in found["rows"].items()]
        stages.append((moment, [line(DENSE, found["dense"][moment]), *own]))
    what = f"{keep:.0%} of the encoder's FFN neurons kept; held out, nats a string of {length} bytes"
    parts: list[Table | str] = [
        what,
        *(table(title, columns, lines) for title, lines in stages),
        f"z is used: KL {before['kl']['value']:.2f} nats, {before['active']:.1f} of "
        f"{found['plan']['sizes']['latent']} dimensions active; with the z of another string reconstruction costs "
        f"{before['shuffled']:.2f} instead of {before['reconstruction']['value']:.2f}",
        table(
            "ELBO of the EMA on the schedule, minus that of ...",
            ("score", "minus", "when", ">nats a string, 95 %"),
            [[c["score"], c["against"], c["when"], _bounds(c)] for c in found["comparisons"]],
        ),
    ]
    if "speed" in found:
        parts.append(_speed_table(found["speed"]))
    intervals = f"intervals over strings and {seeds} seeds" if seeds > 1 else "intervals over strings, one seed"
    took = f"; {found['seconds']:.0f} s in all" if "seconds" in found else ""
    return [*parts, f"{found['text']}, {found['held_out']['strings']} held-out strings; {intervals}{took}"]


def _speed_table(speed: dict[str, Any]) -> Table:
    columns = ("encoder", ">strings", ">ms", ">ratio", ">ceiling", ">FFNs alone, us", ">ratio", ">ceiling")
    lines = [
        [
            name,
            batch,
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{of['ceiling']:.2f}" if name.startswith("compact") else "",
            f"{1e6 * entry['ffn_seconds']:.0f}",
            f"{entry['ffn_ratio']:.2f}",
            f"{speed['ffn_ceiling']:.2f}" if name.startswith("compact") else "",
        ]
        for batch, of in speed["batches"].items()
        for name, entry in of["encoders"].items()
    ]
    dense, compact = speed["neurons"]
    return table(f"the encoder's speed, {dense} and {compact} neurons; ratios to dense", columns, lines)
