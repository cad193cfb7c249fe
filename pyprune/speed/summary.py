"""Measured speeds as rows: what tables and figures share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Speed:
    """One measured speed of one model.

    Attributes:
        what: for people, such as `decode, batch 4`.
        text: the speed with its unit.
        ratio: to the dense model, above 1 = faster.
        ceiling: what the ratio could reach by fewer neurons and smaller weights alone.
        path: `eager` or `compiled`, the faster one.
    """

    what: str
    text: str
    ratio: float
    ceiling: float
    path: str


def speeds(bench: dict[str, Any], name: str) -> Iterator[Speed]:
    """The speeds of model `name` in a `BenchReport.to_json()`: decode, prefill, FFN alone, as dense has them."""
    dense, entry = bench["models"]["dense"], bench["models"][name]
    for batch in dense["decode"]:
        value = entry["decode"][batch]
        yield _speed(f"decode, batch {batch}", f"{value['tokens_per_s']:.1f} tokens/s", value)
    for tokens in dense["prefill"]:
        value = entry["prefill"][tokens]
        yield _speed(f"prefill, {tokens} tokens", f"{value['tokens_per_s']:.0f} tokens/s", value)
    for tokens in dense["ffn"]:
        value = entry["ffn"][tokens]
        yield _speed(f"one FFN, M = {tokens}", f"{value['us']:.0f} us", value)


def _speed(what: str, text: str, value: dict[str, Any]) -> Speed:
    return Speed(what, text, value["ratio"], value["ceiling"], value["path"])
