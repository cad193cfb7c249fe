"""The verb `prune`: scores, mask, compensation and surgery, streamed layer by layer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import InputError, check
from ..base.memory import PeakMemory
from ..base.progress import Progress, quiet
from ..base.windows import check_windows, stack_batches
from ..model import checkpoint, families, surgery
from ..model.mask import KeepIndex, Mask
from ..model.probe import evaluating
from ..model.weights import check_finite
from .allocation import by_latency, by_sensitivity, ranked, uniform
from .blocks import BlockReport, prune_blocks
from .config import PruneConfig
from .pruner import LayerReport, Pruner
from .sensitivity import SensitivityCurves


@dataclass
class PruneReport:
    """What `prune` did.

    Attributes:
        config: as given.
        mask: the keep indices, with the fingerprint of the dense model; None where whole layers were removed.
        layers: one entry an FFN; empty where whole blocks were removed.
        blocks: what happened to whole blocks, or None.
        promise: with allocation `latency`, the speed-up that the chosen widths should have (see `latency`); else None.
        parameters_before, parameters_after: of the whole model, tied weights once.
        bytes_before, bytes_after: of those parameters.
        tokens, window: calibration tokens used, and tokens in a window; 0 where no text was needed.
        seconds: wall time.
        peak_bytes: growth of the process's memory while pruning, over what it held before.
    """

    config: PruneConfig
    mask: Mask | None
    layers: list[LayerReport] = field(default_factory=list)
    blocks: BlockReport | None = None
    promise: float | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    tokens: int = 0
    window: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the mask as widths and fingerprint."""
        plain = {k: v for k, v in vars(self).items() if k not in ("config", "mask", "layers", "blocks")}
        mask = self.mask
        return {
            "config": self.config.to_json(),
            "keep": None if mask is None else mask.keep,
            "widths": None if mask is None else list(mask.widths),
            "fingerprint": None if mask is None else mask.fingerprint,
            "layers": [vars(layer) for layer in self.layers],
            "blocks": None if self.blocks is None else self.blocks.to_json(),
            **plain,
        }


def _check_json(provenance: dict[str, Any] | None) -> None:
    try:
        json.dumps(provenance)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must hold JSON values only; {error}") from error


def _used(config: PruneConfig, mask: Mask | None) -> dict[str, Any]:
    """The part of the configuration that had a say; with a mask, its own provenance tells how neurons were chosen."""
    used = config.to_json()
    idle = []
    if not config.fits:
        idle += ["damping", "target"]
    if config.structure == "neurons":
        idle += ["iterative"]
    else:
        idle += ["method", "allocation", "protect", "multiple", "sequential"]
    if config.protect == (0, 0):
        idle += ["protect"]
    if not config.needs_text:
        idle += ["sequential"]
    if config.allocation == "uniform" or config.structure != "neurons":
        idle += ["floor"]
    if config.allocation != "latency":
        idle += ["target_speedup", "workload"]
    else:
        idle += ["keep"]
    if mask is not None:
        return {k: used[k] for k in ("compensate", "damping", "sequential", "target") if k not in idle}
    return {k: v for k, v in used.items() if k not in idle}


def _totals(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())  # yields tied weights once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _plan(pruner: Pruner) -> tuple[list[KeepIndex] | list[int], float | None]:
    """The neurons that each layer keeps, or how many where that is all that can be said before a layer is reached.

    With allocation `latency`, also the speed-up that was promised.
    """
    config, sizes = pruner.config, pruner.sizes
    rules = config.multiple, config.floor, config.protect
    if config.allocation == "uniform":
        return uniform.uniform_widths(sizes, config.keep, config.multiple, config.protect), None
    if config.allocation == "global":
        return ranked.global_top(pruner.all_scores(), config.keep, *rules), None
    if config.allocation == "sensitivity":
        return by_sensitivity.choose_widths(pruner.curves(), config.keep, *rules), None
    assert config.target_speedup is not None
    table = pruner.latencies()
    target = config.target_speedup
    by_latency.check_target(table, target, *rules[1:])  # before the curves, which take longer
    widths = by_latency.choose_widths(pruner.curves(), table, target, *rules[1:])
    return widths, table.speedup(widths)


def _check_rebuilds(model: nn.Module, ffns: list[families.FFN], config: PruneConfig, mask: Mask | None) -> None:
    """Refuse before any work what could not be saved: with the widths there will be, or else with differing ones."""
    if config.structure == "layer":
        return  # `drop_layers` asks the config first
    sizes = [ffn.intermediate_size for ffn in ffns]
    if mask is not None:
        widths = list(mask.widths)
    elif config.structure == "neurons" and config.allocation == "uniform":
        widths = uniform.uniform_widths(sizes, config.keep, config.multiple, config.protect)
    else:
        widths = [max(1, size - i % 2) for i, size in enumerate(sizes)]
    checkpoint.check_narrows(model, families.ffn_block(model, ffns), widths)


class _Run:
    """What both structures share: checks before anything changes, totals, provenance."""

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        batches: Iterable[Tensor] | Tensor | None,
        mask: Mask | None,
        provenance: dict[str, Any] | None,
        changes: bool = False,
    ) -> None:
        check(mask is None or config.structure == "neurons", "mask", "be None with whole blocks", config.structure)
        needed = config.needs_text if mask is None else config.compensate != "none"
        asked = f"method {config.method!r}, allocation {config.allocation!r} and compensate {config.compensate!r}"
        what = asked if config.structure == "neurons" else f"structure {config.structure!r}"
        check(batches is not None or not needed, "batches", f"be given for {what}", batches)
        _check_json(provenance)
        self.model, self.config, self.mask, self.given = model, config, mask, provenance or {}
        self.ffns = families.find_ffns(model)
        self.ids = None
        if needed and batches is not None:
            self.ids = stack_batches(batches, getattr(model.config, "vocab_size", None))
            check_windows(model, self.ids, "batches")
        check_finite(model)
        if config.compensate == "bias":
            surgery.check_biases(model, self.ffns)
        self.fingerprint = families.fingerprint(model, self.ffns)
        if mask is not None:
            mask.check_fits([f.intermediate_size for f in self.ffns], self.fingerprint)
        if changes:
            _check_rebuilds(model, self.ffns, config, mask)
        self.before = _totals(model)
        self.started = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """What the mask and the checkpoint say of the run."""
        tokens, window = (self.ids.numel(), self.ids.shape[1]) if self.ids is not None else (0, 0)
        facts = {"config": _used(self.config, self.mask), "tokens": tokens, "window": window, **self.given}
        return facts if self.mask is None else {**facts, "mask": self.mask.provenance}

    def report(
        self, layers: list[LayerReport], mask: Mask | None, blocks: BlockReport | None, peak: int
    ) -> PruneReport:
        """Write provenance into the model's config, and sum up."""
        facts = self.facts()
        if blocks is not None:
            facts["blocks"] = blocks.to_json()
        config: Any = self.model.config
        own = getattr(config, "pyprune", None) or {}
        config.pyprune = {**own, "base_fingerprint": self.fingerprint, "provenance": facts}
        after = _totals(self.model)
        return PruneReport(
            self.config,
            None if mask is None else replace(mask, provenance=facts),
            layers,
            blocks,
            None,
            *(self.before[0], after[0], self.before[1], after[1]),
            facts["tokens"],
            facts["window"],
            time.perf_counter() - self.started,
            peak,
        )


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    config: PruneConfig | None = None,
    batches: Iterable[Tensor] | Tensor | None = None,
    *,
    mask: Mask | None = None,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> PruneReport:
    """Remove FFN neurons, whole FFNs or whole layers from a causal LM of Transformers, in place.

    The model keeps its own modules, only narrower, and its config says so; `checkpoint.save` writes it. Where neurons
    compete within a layer only, each layer is scored when it is reached, on what the already pruned layers before it
    produce (`config.sequential`); gradients and everything that compares layers come from the dense model.

    Args:
        model: a causal LM of Transformers, dense or pruned before.
        config: what to do; None for the defaults.
        batches: calibration tokens, `[N, W]` or an iterable of `[W]` / `[B, W]` integer tensors, all of one W. Needed
            by whatever looks at activations or gradients, and by compensation.
        mask: neurons to keep, instead of scoring; what of `config` chooses neurons is then not used.
        progress: called as `(stage, done, total)`.
        provenance: facts about the run (text, versions) that go into the mask and the checkpoint.

    Raises:
        InputError: a value breaks its rule, calibration text is missing or too short, weights are not finite, or the
            mask belongs to another model; the model is unchanged then. Also where scores or activations are not
            finite: if that shows only after some layers were pruned, the message says so, and the model must be loaded
            again.
        UnsupportedModelError: an FFN that pyprune does not know, a compensation that its format cannot hold, or widths
            that its config cannot say; the model is unchanged then.
    """
    config = config or PruneConfig()
    run = _Run(model, config, batches, mask, provenance, changes=True)
    with evaluating(model), PeakMemory() as memory:
        if config.structure != "neurons":
            assert run.ids is not None
            blocks = prune_blocks(model, config, run.ids, progress, config.iterative)
            return run.report([], blocks.mask, blocks, memory.growth)
        pruner = Pruner(model, run.ffns, config, run.ids, progress)
        plan, promise = _plan(pruner) if mask is None else (list(mask.layers), None)
        block = families.ffn_block(model, run.ffns)
        if config.compensate == "bias":
            surgery.give_biases(model, run.ffns)
        keeps = pruner.run(plan)
        surgery.set_widths(model, block, [len(k) for k in keeps])
        report = run.report(pruner.reports, Mask(tuple(keeps), run.fingerprint), None, memory.growth)
        report.promise = promise
        return report


@torch.inference_mode(False)
@torch.no_grad()
def score(
    model: nn.Module,
    config: PruneConfig,
    batches: Iterable[Tensor] | Tensor | None = None,
    progress: Progress = quiet,
) -> list[Tensor]:
    """The scores of all neurons of a dense model by `config.method`, one `[F]` a layer, higher = keep; changes nothing.

    Args and errors as `prune`.
    """
    run = _Run(model, replace(config, compensate="none", target=0.0), batches, None, None)
    with evaluating(model):
        return Pruner(model, run.ffns, run.config, run.ids, progress).all_scores()


@torch.inference_mode(False)
@torch.no_grad()
def curves(
    model: nn.Module,
    config: PruneConfig,
    batches: Iterable[Tensor] | Tensor | None,
    progress: Progress = quiet,
) -> SensitivityCurves:
    """How much the loss of a dense model grows when one layer alone is narrowed as `config` would; changes nothing.

    Args and errors as `prune`.
    """
    check(batches is not None, "batches", "be given for the curves of layers", batches)
    run = _Run(model, replace(config, allocation="sensitivity", target_speedup=None), batches, None, None)
    with evaluating(model):
        return Pruner(model, run.ffns, run.config, run.ids, progress).curves()
