"""Rows of a bench of experts: each way checked, captured and timed; ratios between rows; what the terminal shows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.case import FLOOR, WORSE, WrongResult, error
from bench.gpu.expert_cases import Case
from bench.gpu.timing import Call, Replay, Timer
from bench.mixtures import OTHERS, OWN
from pyprune.base.clock import quantiles
from pyprune.ffn.moe_operator import BACKENDS

PER_ROUND = 3
# A path that rounds elsewhere than torch's is still the same function.
CLOSE = 3e-2
WAITS = "it waits for the device, so that no graph holds it"


def described(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:400]


def prepare(timer: Timer, case: Case, name: str, calls: list[Call], graph: bool, config: Any = None) -> None:
    """Check a variant and make ready what is timed of it; what fails is recorded and costs nothing else."""
    from pyprune import triton_kernels as kernels

    ours = name.partition(" ")[0] in BACKENDS
    try:
        exact, torchs = case.truth(name.endswith("gather"))
        found = error(calls[0](), exact)
        limit = max(WORSE * torchs, FLOOR) if ours else max(WORSE * torchs, CLOSE)
        if found > limit:
            raise WrongResult(f"wrong result: error {found:.3g} where torch has {torchs:.3g}")
        facts: dict[str, Any] = {"captured": graph, "error": found, "torch_error": torchs}
        if graph:
            try:
                replay = timer.capture(calls)
                replay.run()
                timer.synchronize()
                if ours and not torch.equal(replay.first, calls[0]()):
                    raise WrongResult("a replay of the CUDA graph differs from the call")
            except WrongResult:
                raise
            except Exception as problem:  # then as the host launches it
                facts |= {"captured": False, "why_not_captured": described(problem)}
                with contextlib.suppress(Exception):
                    timer.synchronize()
        else:
            facts["why_not_captured"] = WAITS
        if not facts["captured"]:
            few = calls[:4]
            replay = Replay(lambda: [call() for call in few], len(few), *(few[0](), few[-1]()))
        if config is not None:
            facts["config"] = kernels.to_json(config)
        case.row["variants"][name], case.replays[name] = facts, replay
    except Exception as problem:
        case.row["failed"][name] = described(problem)
        timer.synchronize()  # raises where the device itself is lost


def sample(timer: Timer, case: Case, rounds: int) -> None:
    """Time the variants that are ready, in turns, and forget their graphs."""
    samples: dict[str, list[float]] = {name: [] for name in case.replays}
    for i in range(rounds + 1):
        for name, replay in case.replays.items():
            few = not case.row["variants"][name]["captured"]
            found = timer.sample(replay, 1 if few or not i else PER_ROUND)
            samples[name] += found if i else []
    size, read = case.row["bytes"], case.row["read_gb_s"]
    for name, found in samples.items():
        facts = case.row["variants"][name]
        us = quantiles(found, 1e6)
        gb_s = size / us["p50"] / 1e3
        facts |= {"us": us["p50"], "us_quantiles": us, "gb_s": gb_s, "share_of_read": gb_s / read}
    case.replays.clear()
    gc.collect()


def fastest(variants: dict[str, Any], names: Callable[[str], bool]) -> tuple[str, float] | None:
    """The one with the smallest median among those names."""
    found = [(facts["us"], name) for name, facts in variants.items() if names(name) and "us" in facts]
    return (min(found)[1], min(found)[0]) if found else None


def compare(rows: list[dict[str, Any]]) -> None:
    """Put into each row the fastest of Transformers' ways, with all neurons and pruned, and our ratios over them."""
    for row in rows:
        full = next(r for r in rows if (r["model"], r["tokens"], r["keep"]) == (row["model"], row["tokens"], 1.0))
        ways = {
            "dense": fastest(full["variants"], lambda n: n in (OWN, *OTHERS)),
            "pruned": fastest(row["variants"], lambda n: n.startswith("pruned ")),
            "default": fastest(row["variants"], lambda n: n == "triton"),
            "best": fastest(row["variants"], lambda n: n.startswith("triton") and not n.endswith("gather")),
        }
        row["fastest"] = {key: {"by": way[0], "us": way[1]} for key, way in ways.items() if way}
        if ways["default"]:
            for key in ("dense", "pruned"):
                if way := ways[key]:
                    row[f"vs_{key}"] = way[1] / ways["default"][1]


def line(row: dict[str, Any]) -> str:
    """What the terminal shows of a row."""
    variants = {name: f"{facts['us']:.1f}" for name, facts in row["variants"].items() if "us" in facts}
    default = row["variants"].get("triton", {})
    share = f", {default['share_of_read']:.0%} of read" if "share_of_read" in default else ""
    failed = "".join(f"; {name}: {why[:120]}" for name, why in row["failed"].items())
    times = ", ".join(f"{name} {us}" for name, us in variants.items())
    return f"{row['case']}: floor {row['floor_us']:.1f} us; {times}{share}{failed}"
