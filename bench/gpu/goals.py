"""What run.py wants of the GPU kernels, and which of it a result meets, whole or not.

    python -m bench.gpu.goals [RESULT]       prints the goals of bench/results/gpu.json, or of RESULT

Goals are judged on what `auto` runs. Beside each value stands that of our fastest backend, however it was chosen: where
only that one meets the goal, it is the choice that must be mended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

LARGE = ("llama-3-8b", "opt-6.7b")
SMALL = ("gpt2", "smollm2-135m")
# Two measurements of one version differ by as much; "never slower" cannot be asked for more sharply.
SPREAD = 1.02


def us(row: Row, variant: str) -> float | None:
    """Median of a variant, or None where it was not measured."""
    found = row["variants"].get(variant)
    return None if found is None else found["us"]


def best_dense(row: Row, result: Result) -> float | None:
    """Of all neurons, the fastest: torch in a graph, with gate and up in one product, or compiled."""
    compiled = result.get("inductor", {}).get(f"{row['model']} M {row['tokens']}", {}).get("us")
    times = [t for t in (us(row, "dense"), us(row, "dense fused"), compiled) if t]
    return min(times) if times else None


def _over_dense(row: Row, result: Result, variant: str) -> float | None:
    """Speed-up over the best dense, times keep: 1 where all that was saved shows."""
    own, dense = us(row, variant), best_dense(row, result)
    return dense / own * row["keep"] if own and dense else None


def _bandwidth(row: Row, result: Result, variant: str) -> float | None:
    read = result.get("ceilings", {}).get("read", {}).get("gb_s")
    return row["variants"][variant]["gb_s"] / read if read and variant in row["variants"] else None


def _over_inductor(row: Row, result: Result, variant: str) -> float | None:
    dense = result.get("inductor", {}).get(f"{row['model']} M {row['tokens']}", {}).get("us")
    own = us(row, variant)
    return dense / own if own and dense else None


def _launches(row: Row, result: Result, variant: str) -> float | None:
    return row["variants"].get(variant, {}).get("launches")


def _over(first: str) -> Callable[[Row, Result, str], float | None]:
    """Time of a variant as a multiple of the time of `first`."""

    def ratio(row: Row, result: Result, variant: str) -> float | None:
        own, other = us(row, variant), us(row, first)
        return own / other if own and other else None

    return ratio


def _over_cublas(row: Row, result: Result, variant: str) -> float | None:
    own = us(row, variant)
    times = [t for t in (us(row, "compact cublas"), us(row, "compact cublas fused")) if t]
    return own / min(times) if own and times else None


def _int8(row: Row, result: Result, variant: str) -> float | None:
    own, bf16 = us(row, variant), us(row, "compact")
    return bf16 / own if own and bf16 else None


@dataclass(frozen=True)
class Goal:
    """One line of what is wanted.

    Attributes:
        name, rule: for people.
        limit: the least that `value` may be, or the most where `at_most`; None where it is only reported.
        where: the rows it is about.
        value: of a row, the result and a variant, or None where that was not measured.
        forms: variants it holds for.
        best: whether our fastest backend is shown beside.
    """

    name: str
    rule: str
    limit: float | None
    where: Callable[[Row], bool]
    value: Callable[[Row, Result, str], float | None]
    forms: tuple[str, ...] = ("compact",)
    at_most: bool = False
    best: bool = True

    def met(self, value: float) -> bool:
        return self.limit is None or (value <= self.limit if self.at_most else value >= self.limit)


def _is(kind: str, keeps: tuple[float, ...] = (), tokens: tuple[int, ...] = ()) -> Callable[[Row], bool]:
    return lambda r: r["kind"] == kind and (not keeps or r["keep"] in keeps) and (not tokens or r["tokens"] in tokens)


_BOTH, _GATHER = ("compact", "gather"), ("gather",)
_OVER_DENSE = "speed-up over the best dense"
GOALS = (
    Goal("decode M = 1, keep 1.0 and 0.5", ">= 90 % of read bandwidth", 0.90, _is("decode", (1.0, 0.5)), _bandwidth,
         _BOTH),
    Goal("decode M = 1, keep 0.25", ">= 85 % of read bandwidth", 0.85, _is("decode", (0.25,)), _bandwidth, _BOTH),
    Goal("decode M = 1", f"{_OVER_DENSE} >= 0.95/keep", 0.95, _is("decode"), _over_dense, _BOTH),
    Goal("small layers, M = 1, keep 0.5", "one launch", 1, _is("small"), _launches, at_most=True, best=False),
    Goal("small layers, M = 1, keep 0.5", ">= 2x torch.compile'd dense", 2.0, _is("small"), _over_inductor),
    Goal("M = 4, 16, 64", f"{_OVER_DENSE} >= 0.9/keep", 0.90, _is("few", (), (4, 16, 64)), _over_dense),
    Goal("gather, decode", "time <= 1.03x compact", 1.03, _is("decode", (0.5, 0.25)), _over("compact"), _GATHER,
         True),
    Goal("gather, M = 512", "time <= 1.15x compact", 1.15, _is("medium"), _over("compact"), _GATHER, True),
    Goal("prefill M = 4096", f"{_OVER_DENSE} >= 0.95/keep", 0.95, _is("prefill"), _over_dense),
    Goal("prefill M = 4096", f"never slower than compact cuBLAS, within {SPREAD - 1:.0%}", SPREAD, _is("prefill"),
         _over_cublas, at_most=True),
    Goal("int8, decode M = 1", ">= 1.8x our own bfloat16", 1.8, _is("int8"), _int8, ("int8",)),
    Goal("two-kernel gather, the rival", "reported: times the time of our gather", None, _is("decode"), _over("gather"),
         ("two-kernel gather",), best=False),
    Goal("2:4 weights, the rival", "reported: times the time of our compact", None, lambda r: True, _over("compact"),
         ("2:4",), best=False),
)  # fmt: skip
MODEL = {
    "name": "whole model in a CUDA graph, keep 0.5",
    "rule": ">= 92 % of the Amdahl ceiling",
    "limit": 0.92,
    "at_most": False,
}


def _overlapping(row: Row, variant: str) -> str:
    """What must be said of a time in which each call began before the one before it had ended."""
    plan = row["variants"].get(variant, {}).get("plan") or {}
    return ", overlapping its own next call" if plan.get("overlap") else ""


def _best(goal: Goal, row: Row, result: Result, form: str) -> dict[str, Any] | None:
    values = {v: goal.value(row, result, v) for v in row["variants"] if v == form or v.startswith(f"{form}:")}
    found = {name: value for name, value in values.items() if value is not None}
    if not goal.best or not found:
        return None
    name = (min if goal.at_most else max)(found, key=found.__getitem__)
    return {"variant": name + _overlapping(row, name), "value": found[name], "met": goal.met(found[name])}


def _cases(goal: Goal, result: Result) -> list[dict[str, Any]]:
    cases = []
    for row in result.get("rows", []):
        for form in goal.forms if goal.where(row) else ():
            value = goal.value(row, result, form)
            name = row["case"] if len(goal.forms) == 1 else f"{row['case']} {form}"
            name += _overlapping(row, form)
            if value is not None:
                best = _best(goal, row, result, form)
                cases.append({"case": name, "value": value, "met": goal.met(value), "best": best})
            elif form in row["failed"]:
                cases.append({"case": name, "value": None, "met": False, "failed": row["failed"][form], "best": None})
    return cases


def _verdict(facts: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [case for case in cases if case["value"] is not None]
    worst = (max if facts["at_most"] else min)(measured, key=lambda c: c["value"]) if measured else None
    worst = next((case for case in cases if case["value"] is None), worst)
    met = all(case["met"] for case in cases) if cases and facts["limit"] is not None else None
    return {**facts, "met": met, "worst": worst, "cases": cases}


def judge(result: Result) -> list[dict[str, Any]]:
    """Every goal: what was measured, the worst of it, and whether it was met; `met` is None where nothing was."""
    found = []
    for goal in GOALS:
        facts = {"name": goal.name, "rule": goal.rule, "limit": goal.limit, "at_most": goal.at_most}
        found.append(_verdict(facts, _cases(goal, result)))
    models = [
        {
            "case": row["case"] + ("" if row["in_graph"] else ", not in a graph"),
            "value": row["share_of_ceiling"],
            "met": row["in_graph"] and row["share_of_ceiling"] >= MODEL["limit"],
            "best": None,
        }
        for row in result.get("models", [])
    ]
    found.append(_verdict(MODEL, models))
    return found


def cells(goal: dict[str, Any]) -> list[str]:
    """One goal as a line of a table: met in how many of its cases, the worst of them, and our fastest backend there."""
    if not goal["cases"]:
        return [goal["name"], goal["rule"], "not measured", "", "", ""]
    met = sum(case["met"] for case in goal["cases"])
    words = {None: "reported", True: "yes", False: f"no: {met} of {len(goal['cases'])}"}[goal["met"]]
    worst = goal["worst"]
    value = "failed" if worst["value"] is None else f"{worst['value']:.3f}"
    best = worst["best"]
    beside = "" if best is None else f"{best['variant']} {best['value']:.3f}"
    return [goal["name"], goal["rule"], words, value, worst["case"], beside]


HEADER = ("goal", "rule", "met", ">worst", "at", "our fastest there")


def main(path: str = "") -> None:
    """Print the goals of a result file."""
    from bench.gpu.tables import text_table

    file = Path(path) if path else Path(__file__).parents[1] / "results" / "gpu.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    print(text_table(HEADER, map(cells, judge(result))))


if __name__ == "__main__":
    main(*sys.argv[1:])
