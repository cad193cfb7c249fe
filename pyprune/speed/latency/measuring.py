"""The table, measured on this machine: FFNs of every width alone, and whole steps at a few widths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...base import machine
from ...base.clock import Job, clock, interleave, median, timed
from ...base.errors import check
from ...base.progress import Progress, quiet
from ...base.record import Record
from ...ffn.accelerate import accelerate
from ...ffn.mlp import PrunedMLP
from ...model import families
from ...model.narrowing import replaced
from .table import LatencyTable, Workload, factors, rising

# Whole steps are measured at the full width and near these shares of it.
_ANCHORS = (0.75, 0.5, 0.25)
_MOST_CALLS, _CALL_BYTES = 16, 64 << 20
_FEW_TOKENS = 64
_PLAIN = "plain"


def part(module: PrunedMLP, start: int, stop: int) -> PrunedMLP:
    """Neurons `start` to `stop` of an accelerated FFN as one of their own, over the same memory."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[start:stop]

    down_bias = None if module.down_bias is None else module.down_bias.detach()
    own = module.record.detach()[start:stop]
    record = Record(own, module.gated, module.activation, rows(module.scales), rows(module.neuron_bias), down_bias)
    return PrunedMLP(
        record,
        pattern=module.pattern,
        dtype=module.dtype,
        transposed=module.transposed,
        backend=module.backend,
        batch_invariant=module.batch_invariant,
        channel_scales=module.channel_scales,
    ).requires_grad_(False)


def _accelerated(model: nn.Module, weights: str | None) -> nn.Module:
    """A copy of `model`, accelerated; what is outside FFNs lies in the same memory."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return accelerate(copy.deepcopy(model, shared), weights=weights).eval()


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

    Takes the memory of one more copy of the FFNs. What is compared is measured in turn (`clock.interleave`), and
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
    sizes = [ffn.intermediate_size for ffn in families.find_plain(model, "timing of FFNs")]
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
