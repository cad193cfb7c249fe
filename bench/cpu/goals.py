"""What run.py wants of the CPU kernel: the goals, and which of them a result meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One line of what is wanted.

    Attributes:
        name, rule: for people.
        limit: the least that `value` may be, or the most where `at_most`; None where it is only reported.
        where: the rows it is about.
        value: of a row, or None where that was not measured.
        of: the list of the result that holds the rows.
    """

    name: str
    rule: str
    limit: float | None
    where: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    at_most: bool = False
    of: str = "rows"

    def met(self, value: float) -> bool:
        return self.limit is None or (value <= self.limit if self.at_most else value >= self.limit)


def _of(variant: str, key: str) -> Callable[[Row], float | None]:
    return lambda row: row["variants"].get(variant, {}).get(key)


def _time(variant: str, over: str) -> Callable[[Row], float | None]:
    """Time of a variant as a multiple of another's."""

    def ratio(row: Row) -> float | None:
        found = row["variants"]
        return found[variant]["us"] / found[over]["us"] if variant in found and over in found else None

    return ratio


def _floats(row: Row) -> bool:
    return row["weights"] == row["dtype"]


def _decode(row: Row, keep: float | None = None) -> bool:
    return row["tokens"] == 1 and (keep is None or row["keep"] == keep)


def _decode_of(*kinds: str, keep: float | None = None, large: bool = False) -> Callable[[Row], bool]:
    """The rows of one token, of weights of these dtypes; `large`: of D >= 2048 alone."""

    def where(row: Row) -> bool:
        wanted = row["weights"] in kinds and row["keep"] in (1.0, 0.5, 0.25) and _decode(row, keep)
        return wanted and (row["hidden_size"] >= 2048 or not large)

    return where


def _gather(large: bool) -> Callable[[Row], bool]:
    return lambda row: _decode(row, 0.5) and (row["hidden_size"] >= 2048) == large


BANDWIDTH = _of("compact", "share_of_bandwidth")
VS_DENSE = _of("compact", "vs_dense")
VS_TORCH = _of("compact", "vs_torch_compact")
GATHER = _time("gather", "compact")
INDUCTOR_DENSE = _time("inductor-dense", "compact")
INDUCTOR_COMPACT = _time("inductor-compact", "compact")
FLOATS = ("bfloat16", "float32", "float16")

GOALS = (
    Goal("M = 1, floats", ">= 85 % of read bandwidth", 0.85, _decode_of(*FLOATS), BANDWIDTH),
    Goal(
        "M = 1, int8, D >= 2048",
        ">= 75 % of read bandwidth on its own bytes",
        0.75,
        _decode_of("int8", large=True),
        BANDWIDTH,
    ),
    Goal(
        "M = 1, int4, D >= 2048",
        ">= 65 % of read bandwidth on its own bytes",
        0.65,
        _decode_of("int4", large=True),
        BANDWIDTH,
    ),
    Goal("M = 1, int8, keep 1.0", ">= 2.5x torch's bfloat16 dense", 2.5, _decode_of("int8", keep=1.0), VS_DENSE),
    Goal("M = 1, int4, keep 1.0", ">= 4x torch's bfloat16 dense", 4.0, _decode_of("int4", keep=1.0), VS_DENSE),
    Goal(
        "every case",
        "never slower than torch on contiguous compact weights, 3 % of noise",
        0.97,
        lambda r: True,
        VS_TORCH,
    ),
    Goal(
        "M = 4", ">= 1.8x torch on the same compact weights", 1.8, lambda r: r["tokens"] == 4 and _floats(r), VS_TORCH
    ),
    Goal(
        "gather of a random half, M = 1, D < 2048", "time <= 1.10x that of compact", 1.10, _gather(False), GATHER, True
    ),
    Goal(
        "gather of a random half, M = 1, D >= 2048", "time <= 1.03x that of compact", 1.03, _gather(True), GATHER, True
    ),
    Goal(
        "SmolLM2, decode, batch 1, bfloat16, keep 0.5",
        ">= 95 % of the Amdahl ceiling",
        0.95,
        lambda r: r["weights"] == "bfloat16",
        lambda r: r["share_of_ceiling"],
        of="models",
    ),
    Goal("inductor, keep 1.0", "reported: times the time of compact", None, lambda r: r["keep"] == 1.0, INDUCTOR_DENSE),
    Goal(
        "inductor, keep 0.5", "reported: times the time of compact", None, lambda r: r["keep"] == 0.5, INDUCTOR_COMPACT
    ),
)


def case_name(row: Row) -> str:
    """A row in words."""
    if "tokens" not in row:
        return f"{row['model']} {row['weights']} keep {row['keep']:g}"
    return f"{row['model']} {row['weights']} M {row['tokens']} keep {row['keep']:g}"


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal: what was measured, the worst of it, and whether it was met; `met` is None where nothing was."""
    found = []
    for goal in GOALS:
        cases = []
        for row in result[goal.of]:
            value = goal.value(row) if goal.where(row) else None
            if value is not None:
                cases.append({"case": case_name(row), "value": value, "met": goal.met(value)})
        worst = (max if goal.at_most else min)(cases, key=lambda c: c["value"]) if cases else None
        met = all(case["met"] for case in cases) if cases and goal.limit is not None else None
        facts = {"name": goal.name, "rule": goal.rule, "limit": goal.limit, "at_most": goal.at_most}
        found.append({**facts, "met": met, "worst": worst, "cases": cases})
    return found
