"""The representation hierarchy: how far a pruned model is from the dense one, in every layer, logit and probability.

Teacher-forced over a text, one window at a time; of a window only its own hidden states and logits are held. Each layer
is looked at twice: along each model's own stream, where what earlier layers lost has added up, and as a counterfactual
transition, the pruned layer on the hidden state that the dense model has there, which is that layer's loss alone.

Source: He et al. 2026, arXiv 2603.24652. There, whole layers or single weights were pruned; here they are neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check, is_finite
from ...base.memory import release
from ...base.progress import Progress, quiet
from ...base.windows import check_windows, stack_batches
from ...model.families import find_ffns
from ...model.probe import evaluating
from .deviation import probability_deviation, vector_deviation
from .summarise import number, summarise
from .trace import Trace, Tracer

TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0)
# Of a layer.
_SPACES = ("hidden", "ffn", "rest", "hidden_alone", "ffn_alone")
# What is reported of hidden states and logits.
_VECTOR = ("cosine", "angle", "norm", "orthogonal")
# What is reported of each temperature.
_SOFTMAX = (
    "cosine",
    "cosine_estimate",
    "kl",
    "kl_estimate",
    "total_variation",
    "change",
    "change_estimate",
    "change_bound",
)
# Positions for temperatures other than 1.
_SAMPLE = 512
# Of a window whose logits are copied at once.
_ROWS = 32
_BINS = 10

Summary = dict[str, Any]


@dataclass(frozen=True)
class Hierarchy:
    """Deviations of a pruned model from a dense one; a summary is what `summarise` gives.

    Attributes:
        windows, window: N and W of the text.
        layers: for each layer of the dense model its number; `kept`, whether the pruned model has it; and, where it
            has, summaries of 1 - cos (and more, see `_VECTOR`) for `hidden`, the hidden state behind it, `ffn`, what
            its FFN put out, `rest`, what else it added to the hidden state (attention; left out in families where
            something stands between FFN and hidden state), all three along the models' own streams; `hidden_alone` and
            `ffn_alone`, with the dense model's hidden state in front of both layers.
        perplexity: token perplexity of `dense` and `pruned`, and `loss`, the summary of how many nats a token the
            pruned model's loss is above the dense one's.
        embedding: what enters the LM head, in the same way.
        logits, centred: logits as they are, and less their mean over the vocabulary, which no softmax sees.
        probabilities: summaries of `deviation.PROBABILITY` at temperature 1.
        amplification: median over tokens of (1 - cos of probabilities) / (1 - cos of centred logits), and of its
            estimate to second order.
        temperatures: for each temperature the means, over the same positions, of `cosine`, `kl`, `total_variation`,
            `change`, their estimates and the bound.
        breakdown: tokens in ten equal groups by `kl_estimate`: the means of it and of `kl`, so where the second order
            stops to hold.
    """

    windows: int
    window: int
    layers: list[dict[str, Any]]
    perplexity: dict[str, Any]
    embedding: dict[str, Summary]
    logits: dict[str, Summary]
    centred: dict[str, Summary]
    probabilities: dict[str, Summary]
    amplification: dict[str, float | None]
    temperatures: list[dict[str, float]]
    breakdown: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


class _Tally:
    """Values of many measures, by a name for each, window after window."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, space: str, found: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
        for name in names or tuple(found):
            self._values.setdefault((space, name), []).append(found[name].cpu())

    def has(self, space: str) -> bool:
        return any(s == space for s, _ in self._values)

    def values(self, space: str, name: str) -> Tensor:
        """`[N, W]`."""
        return torch.stack(self._values[space, name])

    def every(self, space: str, name: str) -> Tensor:
        """`[T]`, whatever the windows gave."""
        return torch.cat(self._values[space, name])

    def summaries(self, space: str) -> dict[str, Summary]:
        return {n: summarise(self.values(s, n)) for s, n in self._values if s == space}


def kept_layers(dense: nn.Module, pruned: nn.Module) -> list[int]:
    """The number, in the dense model, of each layer of the pruned one.

    Raises:
        InputError: fewer layers, and the pruned model's config does not say which of them stayed.
    """
    config: Any = pruned.config
    count, left = dense.config.num_hidden_layers, config.num_hidden_layers  # type: ignore[union-attr]
    if count == left:
        return list(range(count))  # type: ignore[arg-type]
    provenance = (getattr(config, "pyprune", None) or {}).get("provenance") or {}
    kept = (provenance.get("blocks") or {}).get("kept") or []
    fits = len(kept) == left and all(0 <= i < count for i in kept)
    check(fits, "pruned", f"have the {count} layers of dense, or say in its config which of them stayed", left)
    return list(kept)


def check_same_vocabulary(dense: nn.Module, pruned: nn.Module) -> None:
    """Raise `InputError` unless both models put out the same number of logits, from hidden states of one size."""
    for name in ("vocab_size", "hidden_size"):
        a, b = getattr(dense.config, name, None), getattr(pruned.config, name, None)
        check(a == b, "pruned", f"have the {name} of dense, {a}", b)


def _rest(trace: Trace, layer: int) -> Tensor:
    """`[W, D]`: what a layer adds to the hidden state besides its FFN."""
    return trace.leaving[layer] - trace.entering[layer] - trace.ffn[layer]


def _layers(
    tally: _Tally,
    a: Trace,
    b: Trace,
    alone: Callable[[int], tuple[Tensor, Tensor]],
    kept: list[int],
    adds: bool,
) -> None:
    for mine, theirs in enumerate(kept):
        out, ffn = alone(mine)
        pairs = {
            "hidden": (a.leaving[theirs], b.leaving[mine]),
            "ffn": (a.ffn[theirs], b.ffn[mine]),
            "hidden_alone": (a.leaving[theirs], out),
            "ffn_alone": (a.ffn[theirs], ffn),
        }
        if adds:
            pairs["rest"] = _rest(a, theirs), _rest(b, mine)
        for name, (x, y) in pairs.items():
            tally.add(f"{theirs} {name}", vector_deviation(x, y), _VECTOR)


def _logits(tally: _Tally, x: Tensor, y: Tensor, some: slice, temperatures: Sequence[float]) -> None:
    """Of one window's logits `[W, V]` and their probabilities; at other temperatures of some positions."""
    tally.add("logits", vector_deviation(x, y), _VECTOR)
    tally.add("centred", vector_deviation(x, y, centred=True), (*_VECTOR, "estimate"))
    tally.add("probabilities", probability_deviation(x, y))
    release()
    for temperature in temperatures:
        tally.add(f"at {temperature}", probability_deviation(x[some], y[some], temperature, _SOFTMAX))


def _loss(trace: Trace, ids: Tensor) -> Tensor:
    """`[W - 1]` float64: negative log-likelihood of each token but the first, in nats."""
    targets = ids[1:].to(trace.logits.device)
    parts = zip(trace.logits[:-1].split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.cat([nn.functional.cross_entropy(z.float(), at, reduction="none") for z, at in parts]).double()


def _perplexity(tally: _Tally) -> dict[str, Any]:
    means = {name: float(tally.values("loss", name).mean()) for name in ("dense", "pruned")}
    found = {name: number(math.exp(mean)) if mean < 700 else None for name, mean in means.items()}
    return {**found, "loss": summarise(tally.values("loss", "difference"))}


def _breakdown(estimate: Tensor, exact: Tensor) -> list[dict[str, float]]:
    order = estimate.flatten().argsort()
    groups = zip(estimate.flatten()[order].tensor_split(_BINS), exact.flatten()[order].tensor_split(_BINS), strict=True)
    return [{"estimate": float(e.mean()), "kl": float(x.mean())} for e, x in groups if len(e)]


def _ratio(above: Tensor, below: Tensor) -> float | None:
    """Median of the quotients where there is one."""
    there = below > 0
    return number(float((above[there] / below[there]).median())) if bool(there.any()) else None


@torch.no_grad()
def representation_hierarchy(
    dense: nn.Module,
    pruned: nn.Module,
    windows: Tensor,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Progress = quiet,
) -> Hierarchy:
    """Compare two models layer by layer, in logits and in probabilities, on the same text.

    Args:
        dense, pruned: causal LMs of Transformers, of one vocabulary and hidden size; neither accelerated.
        windows: `[N, W]` token ids.
        temperatures: of the softmax, each above 0.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: another vocabulary or hidden size, layers that cannot be told apart, windows longer than the
            context, token ids out of range, a bad temperature, hidden states or logits that are not finite.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    bad = [t for t in temperatures if not (is_finite(t) and t > 0)]
    check(not bad, "temperatures", "be above 0 and finite", bad)
    check_same_vocabulary(dense, pruned)
    check(windows.shape[-1] >= 2, "windows", "have at least 2 tokens, one to predict", windows.shape[-1])
    kept = kept_layers(dense, pruned)
    ids = stack_batches(windows, getattr(dense.config, "vocab_size", None))
    for model in (dense, pruned):
        check_windows(model, ids, "windows")
    trace_dense, trace_pruned = Tracer(dense, find_ffns(dense)), Tracer(pruned, find_ffns(pruned))
    tally = _Tally()
    adds = False
    every = min(max(1, ids.numel() // _SAMPLE), ids.shape[1])
    with evaluating(dense), evaluating(pruned):
        for i, window in enumerate(ids):
            progress("comparing representations", i, len(ids))
            a, b = trace_dense(window), trace_pruned(window)
            adds = trace_dense.adds_ffn(a) if i == 0 else adds

            def alone(number: int, a: Trace = a, b: Trace = b) -> tuple[Tensor, Tensor]:
                return trace_pruned.layer(number, a.entering[kept[number]], b)

            _layers(tally, a, b, alone, kept, adds)
            tally.add("embedding", vector_deviation(a.final, b.final), _VECTOR)
            losses = {name: _loss(trace, window) for name, trace in (("dense", a), ("pruned", b))}
            tally.add("loss", {**losses, "difference": losses["pruned"] - losses["dense"]})
            x, y = a.logits, b.logits
            del a, b, alone
            release()  # what is kept of each window lies between what is freed
            _logits(tally, x, y, slice(i % every, None, every), temperatures)
            del x, y
            release()
    progress("comparing representations", len(ids), len(ids))
    return _report(tally, ids, kept, int(dense.config.num_hidden_layers), temperatures)  # type: ignore[union-attr, arg-type]


def _at(tally: _Tally, temperature: float) -> dict[str, float]:
    means = {name: float(tally.every(f"at {temperature}", name).mean()) for name in _SOFTMAX}
    return {"temperature": float(temperature), **means}


def _report(tally: _Tally, ids: Tensor, kept: list[int], count: int, temperatures: Sequence[float]) -> Hierarchy:
    layers = [
        {"layer": i, "kept": i in kept, **{s: tally.summaries(f"{i} {s}") for s in _SPACES if tally.has(f"{i} {s}")}}
        for i in range(count)
    ]
    exact, estimate = (tally.values("probabilities", name) for name in ("cosine", "cosine_estimate"))
    logits, logits_estimate = (tally.values("centred", name) for name in ("cosine", "estimate"))
    return Hierarchy(
        windows=len(ids),
        window=ids.shape[1],
        layers=layers,
        perplexity=_perplexity(tally),
        embedding=tally.summaries("embedding"),
        logits=tally.summaries("logits"),
        centred=tally.summaries("centred"),
        probabilities=tally.summaries("probabilities"),
        amplification={"exact": _ratio(exact, logits), "estimate": _ratio(estimate, logits_estimate)},
        temperatures=[_at(tally, t) for t in temperatures],
        breakdown=_breakdown(tally.values("probabilities", "kl_estimate"), tally.values("probabilities", "kl")),
    )
