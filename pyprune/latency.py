"""Widths by latency: what an FFN of each width costs on this machine, with the kernels in use, in this model.

The speed-up that is promised here is that of the accelerated pruned model over the accelerated dense one (`PrunedMLP`
at full width, the best dense path there is), so that only the removed neurons count; the table also holds the step of
the plain Transformers model.

An FFN alone is not quite an FFN in a model: what is in the caches and how threads meet differ. So the shape of a curve
over widths comes from FFNs alone, and its size from whole steps at a few uniform widths: between those, what an FFN
alone saves is multiplied by what the model really saved over what its FFNs alone would have.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import allocation, families, machine, surgery
from .calibration import Progress, quiet
from .errors import InputError, check, check_choice
from .mlp import PrunedMLP
from .quantisation import WEIGHTS
from .roofline import clock
from .sensitivity import SensitivityCurves, replaced
from .timing import Decode, Job, Prefill, interleave, median, timed

KINDS = ("decode", "prefill")
# Whole steps are measured at the full width and near these shares of it.
_ANCHORS = (0.75, 0.5, 0.25)
# What a model saves over what its FFNs alone would; outside, a step was too short or the machine too busy to tell.
_FACTORS = (0.5, 2.0)
_MOST_CALLS, _CALL_BYTES = 16, 64 << 20
_FEW_TOKENS = 64
_PLAIN = "plain"


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        kind: `decode`, steps of one token with a KV cache, or `prefill`, one pass over a prompt.
        tokens: M of an FFN call: sequences decoded at once, or tokens of the prompt.
        prompt_tokens, new_tokens: of a decode run.
        weights: dtype that FFN weights are kept in, as for `accelerate`; None for as they are.

    Raises:
        InputError: a value breaks its rule.
    """

    kind: str = "decode"
    tokens: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 16
    weights: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", KINDS)
        check(self.tokens >= 1, "tokens", "be at least 1", self.tokens)
        check(self.prompt_tokens >= 1, "prompt_tokens", "be at least 1", self.prompt_tokens)
        check(self.new_tokens >= 2, "new_tokens", "be at least 2, since the first step is never timed", self.new_tokens)
        check_choice(self.weights or "float32", "weights", WEIGHTS)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """`decode:1`, `prefill:512` or `decode:1:int8`: kind, tokens, and the dtype of the weights.

        Raises:
            InputError: something else.
        """
        kind, _, rest = text.partition(":")
        tokens, _, weights = rest.partition(":")
        check(tokens.isdigit(), "workload", "be like decode:1, prefill:512 or decode:1:int8", text)
        return cls(kind, int(tokens), weights=weights or None)

    def job(self, model: Any) -> Job:
        """A run of `model` whose samples are the seconds of its steps."""
        generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        rows, length = (self.tokens, self.prompt_tokens) if self.kind == "decode" else (1, self.tokens)
        prompt = torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(device)
        return Decode(model, prompt, self.new_tokens) if self.kind == "decode" else Prefill(model, prompt)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one FFN at each width, and of a whole step of the dense model, on one machine.

    Attributes:
        machine: see `machine.facts`.
        workload: what was timed.
        hidden_size: D.
        sizes: F of each layer.
        widths: ascending; the widest is the largest F.
        alone: median seconds of one FFN alone at each width, reading weights that it has not just read, made to grow
            with the width (neighbours that do not are averaged).
        anchors: width -> median step of the accelerated model with every layer at that width (or its F, if less).
        factors: anchor's width -> what the model saved over what its FFNs alone would have.
        step: median step of the accelerated dense model, the baseline of every speed-up here.
        plain: median step of the Transformers model as it came.

    Raises:
        InputError: numbers that are not finite and positive, or lengths and widths that do not fit together.
    """

    machine: dict[str, Any]
    workload: Workload
    hidden_size: int
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    alone: tuple[float, ...]
    anchors: dict[int, float]
    factors: dict[int, float]
    step: float
    plain: float

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
        check(rising and len(self.widths) > 0, "widths", "be positive and ascend", list(self.widths)[:8])
        check(len(self.alone) == len(self.widths), "alone", f"be {len(self.widths)} numbers", len(self.alone))
        check(len(self.sizes) > 0, "sizes", "hold at least one layer", 0)
        check(max(self.sizes) == self.widths[-1], "widths", f"end with {max(self.sizes)}", self.widths[-1])
        numbers = [*self.alone, *self.anchors.values(), *self.factors.values(), self.step, self.plain]
        bad = [v for v in numbers if not 0 < v < math.inf]
        check(not bad, "seconds", "be positive and finite", bad[:3])
        saved = sum(self.cost(size) - min(map(self.cost, self.widths)) for size in self.sizes)
        check(saved < self.step, "step", f"be more than the {saved:g} s that its FFNs can save", self.step)

    def cost(self, width: int) -> float:
        """Seconds of one FFN of this width in the model; between two widths of the table on a straight line.

        Raises:
            InputError: narrower than any width of the table, or wider than all.
        """
        within = self.widths[0] <= width <= self.widths[-1]
        check(within, "width", f"lie in [{self.widths[0]}, {self.widths[-1]}], the table's", width)
        alone = float(np.interp(width, self.widths, self.alone))
        factor = 1.0
        if self.factors:
            known = sorted(self.factors)
            factor = float(np.interp(width, known, [self.factors[w] for w in known]))
        return self.alone[-1] - factor * (self.alone[-1] - alone)

    @property
    def rest(self) -> float:
        """Seconds of a step of the dense model outside its FFNs."""
        return self.step - sum(self.cost(size) for size in self.sizes)

    def predict(self, widths: Sequence[int]) -> float:
        """Seconds of a step of the accelerated model with these widths.

        Raises:
            InputError: not one width a layer, or one that is wider than its layer or not in the table's range.
        """
        check(len(widths) == len(self.sizes), "widths", f"be given for {len(self.sizes)} layers", len(widths))
        wide = [(w, size) for w, size in zip(widths, self.sizes, strict=True) if w > size]
        check(not wide, "widths", "be at most F of the layer", wide[:1])
        return self.rest + sum(self.cost(width) for width in widths)

    def speedup(self, widths: Sequence[int]) -> float:
        """Of the accelerated model with these widths over the accelerated dense one."""
        return self.step / self.predict(widths)

    def largest(self, least: Sequence[int] | None = None) -> float:
        """The largest speed-up that any widths reach; with `least`, that are no narrower than it in any layer."""
        least = least or [self.widths[0]] * len(self.sizes)
        cheapest = [
            min((w for w in {*self.widths, size} if low <= w <= size), key=self.cost)
            for low, size in zip(least, self.sizes, strict=True)
        ]
        return self.speedup(cheapest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LatencyTable:
        """What `to_json` gave, also after a file made strings of its keys.

        Raises:
            InputError: something else.
        """
        try:
            return cls(
                **{
                    **values,
                    "workload": Workload(**values["workload"]),
                    **{name: tuple(values[name]) for name in ("sizes", "widths", "alone")},
                    **{name: {int(w): v for w, v in values[name].items()} for name in ("anchors", "factors")},
                }
            )
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"table must be as `to_json` gives it; {type(error).__name__}: {error}") from error


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by least squares, that never fall: neighbours that do are replaced by their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def factors(
    sizes: Sequence[int], widths: Sequence[int], alone: Sequence[float], anchors: Mapping[int, float], step: float
) -> dict[int, float]:
    """Anchor's width -> seconds that the model saved over those that its FFNs alone would have, within `_FACTORS`.

    Where FFNs alone save nothing it is 1: there is nothing to compare.
    """
    found = {}
    for width, seconds in anchors.items():
        saved = sum(
            float(np.interp(size, widths, alone) - np.interp(min(width, size), widths, alone)) for size in sizes
        )
        low, high = _FACTORS
        found[width] = min(high, max(low, (step - seconds) / saved)) if saved > 0 else 1.0
    return found


def part(module: PrunedMLP, start: int, stop: int) -> PrunedMLP:
    """Neurons `start` to `stop` of an accelerated FFN as one of their own, over the same memory."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[start:stop]

    return PrunedMLP(
        module.record.detach()[start:stop],
        rows(module.neuron_bias),
        None if module.down_bias is None else module.down_bias.detach(),
        pattern=module.pattern,
        activation=module.activation,
        scales=rows(module.scales),
        dtype=module.dtype,
        transposed=module.transposed,
        backend=module.backend,
        batch_invariant=module.batch_invariant,
    ).requires_grad_(False)


def _accelerated(model: nn.Module, weights: str | None) -> nn.Module:
    """A copy of `model`, accelerated; what is outside FFNs lies in the same memory."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return surgery.accelerate(copy.deepcopy(model, shared), weights=weights).eval()


def _modules(model: nn.Module) -> list[PrunedMLP]:
    return [module for module in model.modules() if isinstance(module, PrunedMLP)]


def _at_width(model: nn.Module, width: int, job: Job) -> Job:
    """`job`, a run of the accelerated `model`, with only the first `width` neurons of every FFN."""
    narrow = [(module, part(module, 0, min(width, module.intermediate_size))) for module in _modules(model)]

    def run() -> Sequence[float]:
        with ExitStack() as stack:
            for module, own in narrow:
                stack.enter_context(replaced(module, own.forward))
            return job()

    return run


def _alone(modules: Sequence[PrunedMLP], width: int, x: Tensor) -> Job:
    """Passes of FFNs of `width` neurons over parts of the model's records that do not overlap; a sample for one FFN.

    Every pass takes other parts than the one before, so that it finds its weights where a step does: in memory.
    """
    size = modules[0].record[:1].nbytes * width
    few = x.numel() // x.shape[-1] <= _FEW_TOKENS
    calls = max(2, min(_MOST_CALLS, _CALL_BYTES // size)) if few else 1
    passes = 3 if few else 1
    # Round by round over the layers, so that neighbours in a pass are not neighbours in memory.
    starts = range(0, max(m.intermediate_size for m in modules), width)
    places = [(m, start) for start in starts for m in modules if start + width <= m.intermediate_size]
    ffns = itertools.cycle([part(module, start, start + width) for module, start in places[: 4 * calls * passes]])

    @torch.no_grad()
    def run() -> None:
        for ffn in itertools.islice(ffns, calls):
            ffn(x)

    return timed(run, clock(x.device), passes, share=calls)


def _anchors(widths: Sequence[int]) -> list[int]:
    """Widths near `_ANCHORS` of the widest, and the narrowest; without the widest, which is the dense model itself."""
    full = widths[-1]
    near = {min(widths, key=lambda w: abs(w - share * full)) for share in _ANCHORS}
    return sorted((near | {widths[0]}) - {full})


@torch.no_grad()
def measure(
    model: Any,
    widths: Sequence[int],
    workload: Workload | None = None,
    repeats: int = 5,
    progress: Progress = quiet,
) -> LatencyTable:
    """Time FFNs of every width with the kernels in use, and whole steps at a few uniform widths, on this machine.

    Takes the memory of one more copy of the FFNs. What is compared is measured in turn (`timing.interleave`), and
    medians count; whatever else runs on the machine meanwhile makes the table worse.

    Args:
        model: the dense model, a causal LM of Transformers in eval mode, not accelerated; it stays as it is.
        widths: to be in the table; F of every layer is put in.
        workload: what to time; None for decode with one sequence.
        repeats: recorded rounds, after one that is not.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: a value breaks its rule, or the model is in training mode.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    workload = workload or Workload()
    sizes = [ffn.intermediate_size for ffn in families.find_ffns(model)]
    strange = [w for w in widths if not isinstance(w, int) or not 1 <= w <= max(sizes)]
    check(len(widths) > 0 and not strange, "widths", f"be one or more numbers in [1, {max(sizes)}]", strange[:3])
    check(repeats >= 1, "repeats", "be at least 1", repeats)
    check(not model.training, "model", "be in eval mode", "a model in training mode")
    known = sorted({*widths, *sizes})
    facts = machine.facts()
    fast = _accelerated(model, workload.weights)
    modules = _modules(fast)

    job = workload.job(fast)
    steps: dict[str, Job] = {_PLAIN: workload.job(model), str(known[-1]): job}
    for width in _anchors(known):
        steps[str(width)] = _at_width(fast, width, job)
    found = _medians("timing whole steps", steps, repeats, progress)
    plain, step = found.pop(_PLAIN), found.pop(str(known[-1]))
    anchors = {int(width): seconds for width, seconds in found.items()}

    shape = (workload.tokens, 1) if workload.kind == "decode" else (1, workload.tokens)
    x = torch.randn(*shape, modules[0].hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(modules[0].record.device, modules[0].dtype)
    ffns = {str(width): _alone(modules, width, x) for width in known}
    alone = rising(list(_medians("timing FFNs of every width", ffns, repeats, progress).values()))
    return LatencyTable(
        machine=facts,
        workload=workload,
        hidden_size=modules[0].hidden_size,
        sizes=tuple(sizes),
        widths=tuple(known),
        alone=tuple(alone),
        anchors=anchors,
        factors=factors(sizes, known, alone, anchors, step),
        step=step,
        plain=plain,
    )


def _medians(stage: str, jobs: Mapping[str, Job], repeats: int, progress: Progress) -> dict[str, float]:
    report: Callable[[int, int], None] = lambda done, total: progress(stage, done, total)  # noqa: E731
    return {name: median(samples) for name, samples in interleave(jobs, repeats, report).items()}


def _least(table: LatencyTable, floor: float, protect: tuple[int, int]) -> list[int]:
    """The narrowest width that each layer may get, in the table's range."""
    rows = allocation.candidate_widths(table.sizes, 1, floor, protect)
    return [max(row[0], min(table.widths[0], size)) for row, size in zip(rows, table.sizes, strict=True)]


def check_target(
    table: LatencyTable, target_speedup: float, floor: float = 0.0, protect: tuple[int, int] = (0, 0)
) -> None:
    """Raise `InputError` unless some widths that `floor` and `protect` allow reach the target, which is 1 at least."""
    check(1 <= target_speedup < math.inf, "target_speedup", "be a number of at least 1", target_speedup)
    largest = table.largest(_least(table, floor, protect))
    rule = f"be at most {math.floor(largest * 1000) / 1000:.3f}, the largest that any allowed widths reach here"
    check(target_speedup <= largest, "target_speedup", rule, target_speedup)


def choose_widths(
    curves: SensitivityCurves,
    table: LatencyTable,
    target_speedup: float,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[int]:
    """The widths that cost least by `curves` among those whose step is predicted to be `target_speedup` times faster.

    Args:
        curves: of the dense model.
        table: of the same, on this machine.
        target_speedup: of the accelerated pruned model over the accelerated dense one, at least 1.
        floor: least share of neurons kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: the target is below 1 or above what any widths reach here, or table and curves are of different
            models.
    """
    check_target(table, target_speedup, floor, protect)
    same = table.sizes == curves.sizes
    check(same, "table", f"be of a model with widths {list(curves.sizes)[:4]}...", list(table.sizes)[:4])
    least = _least(table, floor, protect)
    choices = [
        sorted({w for w in table.widths if low <= w <= size} | {size}, reverse=True)
        for low, size in zip(least, table.sizes, strict=True)
    ]
    losses = [curves.at(i, row) for i, row in enumerate(choices)]
    # Against the dense FFN, so that a target of 1 is met by it to the last bit.
    costs = [[table.cost(w) - table.cost(size) for w in row] for row, size in zip(choices, table.sizes, strict=True)]
    # A target that only the cheapest widths reach must not be lost to rounding.
    budget = max(table.step / target_speedup - table.step, math.fsum(min(row) for row in costs))
    chosen = allocation.exact(losses, costs, budget)
    return [row[i] for row, i in zip(choices, chosen, strict=True)]
