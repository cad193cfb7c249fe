"""The result of `compare` as rows: what tables and figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean
from typing import Any

# In place of a text: all texts of a result with a suite together.
MEAN = "geometric mean"


def judged_texts(result: Mapping[str, Any]) -> list[str]:
    """The evaluation texts of a `Comparison.to_json()`; with a suite, their geometric mean before them."""
    return [*([MEAN] if result.get("suite") else []), *result["evaluation"]]


def perplexity_on(perplexities: Mapping[str, float], text: str) -> float:
    """Of perplexities by text the one of `text`, which may be `MEAN`."""
    return geometric_mean(perplexities.values()) if text == MEAN else perplexities[text]


@dataclass(frozen=True)
class Point:
    """One setting of `pyprune compare` at one share kept; means over its seeds.

    Attributes:
        keep: the share of neurons that was asked for.
        kept: the share that stayed.
        perplexity: mean over the seeds.
        lowest, highest: over the seeds.
        seeds: how many.
        seconds: to prune, and to be taught afterwards where it was.
    """

    keep: float
    kept: float
    perplexity: float
    lowest: float
    highest: float
    seeds: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """One setting of `pyprune compare` over the shares kept, the largest first."""

    label: str
    group: str
    points: tuple[Point, ...]


def comparison_lines(result: Mapping[str, Any], text: str) -> list[Line]:
    """The settings of a `Comparison.to_json()` on one evaluation text, or `MEAN`; rows that failed are left out."""
    groups: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = {}
    for row in result["rows"]:
        if "error" not in row:
            by_keep = groups.setdefault((row["label"], row["group"]), {})
            by_keep.setdefault(row["keep"], []).append(row)
    return [
        Line(label, group, tuple(_point(keep, by_keep[keep], text) for keep in sorted(by_keep, reverse=True)))
        for (label, group), by_keep in groups.items()
    ]


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["prune_seconds"] + row.get("recovery", {}).get("seconds", 0.0))


def _point(keep: float, rows: Sequence[Mapping[str, Any]], text: str) -> Point:
    values = [perplexity_on(row["perplexity"], text) for row in rows]
    kept, seconds = fmean(row["kept"] for row in rows), fmean(map(_seconds, rows))
    return Point(keep, kept, fmean(values), min(values), max(values), len(values), seconds)
