"""One case measured: every variant built, checked against float64, captured, and timed in turns with the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu.cases import Case
from bench.gpu.layers import Arena, Layer, Variant
from bench.gpu.rivals import RIVALS, Unavailable
from bench.gpu.timing import Replay, Timer
from pyprune.base.clock import quantiles
from pyprune.ffn import dispatch
from pyprune.ffn.backends import cuda
from pyprune.ffn.quantisation import WEIGHTS

ROUNDS, PER_ROUND = 6, 4
# Our error against float64 may be twice torch's in the same dtype; the floor is for sums that torch gets exactly.
WORSE, FLOOR = 2.0, 1e-6
CLOSE = 1e-2
# Most tokens of what models call once a token, where launches count.
FEW = 16
_APART, _BETWEEN = " apart", "between"

Build = Callable[[], Variant]


class WrongResult(Exception):  # noqa: N818 - recorded, never raised to a user
    """What a variant computed is not the FFN."""


def _raising(problem: Exception) -> Build:
    def build() -> Variant:
        raise problem

    return build


def _ours(layer: Layer, form: str, gather: bool, weights: torch.dtype) -> Iterator[tuple[str, Build]]:
    """`form` by auto, by every backend that can, and by further configurations of those."""
    problem = layer.problem(gather, weights)
    yield form, lambda: layer.module(gather, weights, "auto")
    for name, backend in dispatch.backends().items():
        if backend.why_not(problem) is not None or (name == cuda.NAME and layer.case.tokens > FEW):
            continue  # the native kernels take eight tokens a launch: 0.1 s for 4096
        yield f"{form}:{name}", lambda name=name: layer.module(gather, weights, name)
        most = layer.case.plans if name == cuda.NAME else layer.case.configs
        try:
            configs = backend.candidate_configs(problem)[1 : 1 + most] if most else []
        except Exception as problem_of_it:
            yield f"{form}:{name} configurations", _raising(problem_of_it)
            continue
        for number, config in enumerate(configs, 2):
            yield (
                f"{form}:{name} #{number}",
                lambda name=name, config=config: layer.configured(gather, weights, name, dict(config)),
            )


def builders(layer: Layer) -> Iterator[tuple[str, Build]]:
    """Every variant of a case by name, made when it is its turn."""
    case, own = layer.case, layer.arena.dtype
    f, k = case.shape.intermediate_size, case.neurons
    yield "dense", lambda: layer.dense(f)
    if case.shape.gated:
        yield "dense fused", lambda: layer.dense_fused(f)
    if k < f:
        yield "compact cublas", lambda: layer.dense(k)
        if case.shape.gated:
            yield "compact cublas fused", lambda: layer.dense_fused(k)
    yield from _ours(layer, "compact", False, own)
    if case.kind == "int8":
        yield from _ours(layer, "int8", False, WEIGHTS["int8"])
        return
    if k < f:
        yield from _ours(layer, "gather", True, own)
    for name in case.wants:
        yield name, lambda name=name: RIVALS[name](layer)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|; NaN counts as infinite."""
    value = float((found.double().view(truth.shape) - truth).norm() / truth.norm())
    return value if math.isfinite(value) else math.inf


def verify(variant: Variant) -> dict[str, float]:
    """Errors of the variant's first call and of torch's; empty for a rival that has no truth to meet."""
    if variant.truth is None:
        return {}
    truth, torchs = variant.truth()
    own, other = error(variant.calls[0](), truth), error(torchs, truth)
    if own > max(WORSE * other, FLOOR):
        raise WrongResult(f"wrong result: error {own:.3g} where torch has {other:.3g}")
    return {"error": own, "torch_error": other}


def verify_replay(timer: Timer, layer: Layer, variant: Variant, replay: Replay) -> None:
    """A replay's first and last call must compute on what x holds now what they compute outside of a graph: to the bit,
    but for cuBLAS, which may choose otherwise under capture.
    """
    if variant.truth is None or timer.device.type != "cuda" or variant.backend == "rival":
        return
    before = layer.x.clone()
    layer.x.normal_()
    replay.run()
    timer.synchronize()
    last = (replay.calls - 1) % len(variant.calls)
    for found, call in ((replay.first, variant.calls[0]), (replay.last, variant.calls[last])):
        wanted = call()
        same = torch.equal(found, wanted)
        if not same and variant.backend in ("torch", "cublas"):
            same = error(found, wanted.double()) < CLOSE
        if not same:
            layer.x.copy_(before)
            raise WrongResult("a replay of the CUDA graph differs from the call")
    layer.x.copy_(before)


def _facts(timer: Timer, case: Case, variant: Variant, replay: Replay, checked: dict[str, float]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "backend": variant.backend,
        "config": variant.config,
        "bytes": variant.bytes,
        "sets": len(variant.calls),
        "calls": replay.calls,
        **checked,
    }
    if variant.plan is not None:
        facts["plan"] = variant.plan
    if case.tokens <= FEW:
        eager, host = timer.eager(variant.calls)
        one = timer.nodes(variant.calls[:1])
        facts |= {"eager_us": eager * 1e6, "host_us": host * 1e6, "launches": one and one[0]}
    return facts


def _apart(timer: Timer, layer: Layer, name: str, variant: Variant) -> Replay | None:
    """The calls with another kernel before each: of the native kernels as they are, and wherever they overlap.

    In a graph of nothing but these calls one begins before the one before it has ended. A model has that between two
    kernels of ours only, so this is what overlapping is worth behind anything else.
    """
    native = variant.backend == layer.x.device.type
    wanted = native and (name.endswith(f":{variant.backend}") or (variant.config or {}).get("overlap"))
    return timer.capture(layer.separated(variant.calls)) if wanted and layer.case.tokens <= FEW else None


Say = Callable[[str], None]


@torch.no_grad()
def measure(case: Case, arena: Arena, timer: Timer, skip: set[str], say: Say, rounds: int = ROUNDS) -> dict[str, Any]:
    """The row of a case.

    Args:
        case: an FFN's.
        arena: where weights lie.
        timer: of the device.
        skip: variants that have brought a process down, by name; they are not tried again.
        say: told the name of the variant that is about to run.
        rounds: of PER_ROUND samples of every variant.
    """
    layer = Layer.make(case, arena)
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    replays: dict[str, Replay] = {}
    for name, build in builders(layer):
        if name in skip:
            continue
        say(name)
        try:
            variant = build()
            checked = verify(variant)
            replay = timer.capture(variant.calls)
            verify_replay(timer, layer, variant, replay)
            known = _facts(timer, case, variant, replay, checked)
            apart = _apart(timer, layer, name, variant)
            if apart is not None:
                replays[name + _APART] = apart
                two = timer.nodes([*variant.calls, *variant.calls][:2])
                known["programmatic_edges"] = two and two[1]
            facts[name], replays[name] = known, replay
        except Unavailable as reason:
            failed[name] = str(reason)
        except Exception as problem:  # one variant must not cost the others
            failed[name] = " ".join(f"{type(problem).__name__}: {problem}".split())[:400]
            timer.synchronize()  # raises where the device itself is lost: the process must end then
    say("timing")
    if any(name.endswith(_APART) for name in replays):
        replays[_BETWEEN] = timer.capture(layer.separated([lambda: layer.x] * 64))
    samples: dict[str, list[float]] = {name: [] for name in replays}
    clocks: dict[str, list[int]] = {}
    for i in range(rounds + 1):
        for name, replay in replays.items():
            found = timer.sample(replay, PER_ROUND if i else 1)
            samples[name] += found if i else []
        for name, mhz in timer.clocks().items():
            clocks.setdefault(name, []).append(mhz)
    for name, entry in facts.items():
        spread = quantiles(samples[name], 1e6)
        entry |= {"us": spread["p50"], "us_quantiles": spread, "samples": len(samples[name])}
        entry["gb_s"] = entry["bytes"] / entry["us"] / 1e3
        if apart_samples := samples.get(name + _APART):
            entry["apart_us"] = quantiles(apart_samples, 1e6)["p50"]
    between = {"between_us": quantiles(samples[_BETWEEN], 1e6)["p50"]} if _BETWEEN in samples else {}
    problems = {"compact": (False, arena.dtype), "gather": (True, arena.dtype), "int8": (False, torch.int8)}
    unusable = {
        f"{form}:{name}": reason
        for form, (gather, weights) in problems.items()
        for name, backend in dispatch.backends().items()
        if (form != "int8" or case.kind == "int8") and (reason := backend.why_not(layer.problem(gather, weights)))
    }
    shape = case.shape
    return {
        "case": case.name,
        "kind": case.kind,
        "model": shape.name,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "gated": shape.gated,
        "activation": shape.activation,
        "dtype": str(arena.dtype).removeprefix("torch."),
        "weights": case.weights,
        "tokens": case.tokens,
        "keep": case.neurons / shape.intermediate_size,
        "flops_dense": 2 * case.tokens * shape.hidden_size * shape.intermediate_size * (3 if shape.gated else 2),
        **between,
        "clocks": {name: [min(values), max(values)] for name, values in clocks.items()},
        "variants": facts,
        "failed": failed,
        "unusable": unusable,
    }
