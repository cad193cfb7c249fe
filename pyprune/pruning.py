"""The verb `prune`: scores, mask, compensation and surgery, streamed layer by layer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import allocation, families, importance, surgery
from .calibration import LayerStream, Progress, check_windows, quiet, stack_batches
from .compensation import least_squares, mean_bias
from .config import PruneConfig
from .errors import InputError, check
from .families import FFN
from .importance import ActivationStats
from .mask import KeepIndex, Mask
from .memory import PeakMemory, release
from .probe import evaluating


@dataclass
class LayerReport:
    """What pruning did to one FFN.

    Attributes:
        layer: its number.
        before, after: neurons.
        error_cut, error_repaired: squared error of the FFN's output over the calibration tokens relative to the
            squared dense output, for the bare cut and after least squares; None where not measured.
    """

    layer: int
    before: int
    after: int
    error_cut: float | None = None
    error_repaired: float | None = None


@dataclass
class PruneReport:
    """What `prune` did.

    Attributes:
        config: as given.
        mask: the keep indices, with the fingerprint of the dense model.
        layers: one entry an FFN.
        parameters_before, parameters_after: of the whole model, tied weights once.
        bytes_before, bytes_after: of those parameters.
        tokens, window: calibration tokens used, and tokens in a window; 0 where no text was needed.
        seconds: wall time.
        peak_bytes: growth of the process's memory while pruning, over what it held before.
    """

    config: PruneConfig
    mask: Mask
    layers: list[LayerReport] = field(default_factory=list)
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
        plain = {k: v for k, v in vars(self).items() if k not in ("config", "mask", "layers")}
        return {
            "config": self.config.to_json(),
            "keep": self.mask.keep,
            "widths": list(self.mask.widths),
            "fingerprint": self.mask.fingerprint,
            "layers": [vars(layer) for layer in self.layers],
            **plain,
        }


class _Pruner:
    """One run of `prune`: the model, what it must do, and the report it fills."""

    def __init__(
        self, model: nn.Module, ffns: list[FFN], config: PruneConfig, ids: Tensor | None, progress: Progress
    ) -> None:
        self.model, self.ffns, self.config, self.ids, self.progress = model, ffns, config, ids, progress
        self.criterion = importance.get(config.method)
        self.reports: list[LayerReport] = []

    def scores(self, ffn: FFN, stats: ActivationStats | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + ffn.layer)
        return self.criterion(ffn.weights(), stats, generator)

    def stream(self) -> LayerStream:
        assert self.ids is not None
        self.progress("embedding the calibration text", 0, 1)
        return LayerStream(self.model, self.ffns, self.ids)

    def all_scores(self) -> list[Tensor]:
        """Scores of every layer of the dense model."""
        stream = self.stream() if self.criterion.needs_activations else None
        scores = []
        for ffn in self.ffns:
            self.progress("scoring neurons", ffn.layer, len(self.ffns))
            scores.append(self.scores(ffn, stream.statistics(ffn, gram=False) if stream else None))
            if stream:
                stream.advance()
        return scores

    def prune_layer(self, ffn: FFN, keep: KeepIndex, stats: ActivationStats | None) -> None:
        report = LayerReport(ffn.layer, keep.intermediate_size, len(keep))
        weights = ffn.weights()
        kept = keep.neurons.long().to(weights.down.device)
        down = shift = None
        if self.config.compensate == "least-squares" and stats is not None:
            repair = least_squares(weights.down, stats, kept, self.config.damping)
            down, report.error_cut, report.error_repaired = repair.down, repair.error_before, repair.error_after
        elif self.config.compensate == "bias" and stats is not None:
            removed = torch.ones(keep.intermediate_size, dtype=torch.bool, device=kept.device)
            removed[kept] = False
            shift = mean_bias(weights.down, stats, removed)
        surgery.cut(ffn, keep, down, shift)
        self.reports.append(report)

    def step(self, ffn: FFN, keep: KeepIndex | None, stream: LayerStream | None) -> KeepIndex:
        """Score one layer if `keep` is None, and prune it."""
        config = self.config
        stats = stream.statistics(ffn, gram=config.compensate == "least-squares") if stream else None
        if keep is None:
            (keep,) = allocation.uniform([self.scores(ffn, stats)], config.keep, config.multiple)
        self.prune_layer(ffn, keep, stats)
        if stream:
            stream.advance()
        release()
        return keep

    def run(self, keeps: list[KeepIndex] | None) -> list[KeepIndex]:
        """Prune every layer; `keeps` None means: score each layer when it is reached, pruned layers upstream."""
        compensating = self.config.compensate != "none"
        scoring = keeps is None and self.criterion.needs_activations
        stream = self.stream() if compensating or scoring else None
        chosen = []
        for ffn in self.ffns:
            self.progress("pruning layers", ffn.layer, len(self.ffns))
            try:
                chosen.append(self.step(ffn, None if keeps is None else keeps[ffn.layer], stream))
            except InputError as error:
                done = "; earlier layers are pruned already, so load the model again" if self.reports else ""
                raise InputError(f"layer {ffn.layer}: {error}{done}") from error
        self.progress("pruning layers", len(self.ffns), len(self.ffns))
        return chosen


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        check(bool(parameter.isfinite().all()), "model", "have finite weights", f"NaN or infinity in {name}")


def _check_json(provenance: dict[str, Any] | None) -> None:
    try:
        json.dumps(provenance)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must hold JSON values only; {error}") from error


def _used(config: PruneConfig, mask: Mask | None) -> dict[str, Any]:
    """The part of the configuration that had a say; with a mask, its own provenance tells how neurons were chosen."""
    used = config.to_json()
    if config.compensate != "least-squares":
        del used["damping"]
    if config.scope != "global":
        del used["floor"]
    return used if mask is None else {k: v for k, v in used.items() if k in ("compensate", "damping")}


def _totals(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())  # yields tied weights once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


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
    """Remove FFN neurons from a causal LM of Transformers, in place.

    The model keeps its own modules, only narrower, and its config says so; `checkpoint.save` writes it.
    With scope `layer`, each layer is scored and repaired on what the already pruned layers before it produce; with
    scope `global`, scores come from the dense model.

    Args:
        model: a causal LM of Transformers, dense or pruned before.
        config: what to do; None for the defaults.
        batches: calibration tokens, `[N, W]` or an iterable of `[W]` / `[B, W]` integer tensors, all of one W. Needed
            by methods that look at activations and by compensation.
        mask: neurons to keep, instead of scoring; `config.keep`, `method` and `scope` are then not used.
        progress: called as `(stage, done, total)`.
        provenance: facts about the run (text, versions) that go into the mask and the checkpoint.

    Raises:
        InputError: a value breaks its rule, calibration text is missing, weights are not finite, or the mask belongs to
            another model; the model is unchanged then. Also where scores or activations are not finite: if that shows
            only after some layers were pruned, the message says so, and the model must be loaded again.
        UnsupportedModelError: an FFN that pyprune does not know, or a compensation that its format cannot hold; the
            model is unchanged then.
    """
    config = config or PruneConfig()
    needed = config.compensate != "none" or (mask is None and config.needs_text)
    check(
        batches is not None or not needed,
        "batches",
        f"be given for method {config.method!r} with compensate {config.compensate!r}",
        batches,
    )
    _check_json(provenance)
    ffns = families.find_ffns(model)
    ids = None
    if needed and batches is not None:
        ids = stack_batches(batches, getattr(model.config, "vocab_size", None))
        check_windows(model, ids, "batches")
    _check_finite(model)
    if config.compensate == "bias":
        surgery.check_biases(model, ffns)
    pruner = _Pruner(model, ffns, config, ids, progress)
    block = families.ffn_block(model, ffns)
    fingerprint = families.fingerprint(model, ffns)
    if mask is not None:
        mask.check_fits([f.intermediate_size for f in ffns], fingerprint)
    before = _totals(model)
    started = time.perf_counter()
    with evaluating(model), PeakMemory() as memory:
        keeps = None if mask is None else list(mask.layers)
        if keeps is None and config.scope == "global":
            keeps = allocation.global_top(pruner.all_scores(), config.keep, config.multiple, config.floor)
        if config.compensate == "bias":
            surgery.give_biases(model, ffns)
        keeps = pruner.run(keeps)
    tokens, window = (ids.numel(), ids.shape[1]) if ids is not None else (0, 0)
    facts = {"config": _used(config, mask), "tokens": tokens, "window": window, **(provenance or {})}
    if mask is not None:
        facts = {**facts, "mask": mask.provenance}
    surgery.set_widths(model, block, [len(k) for k in keeps])
    model_config: Any = model.config
    model_config.pyprune = {**model_config.pyprune, "base_fingerprint": fingerprint, "provenance": facts}
    after = _totals(model)
    return PruneReport(
        config,
        Mask(tuple(keeps), fingerprint, facts),
        pruner.reports,
        before[0],
        after[0],
        before[1],
        after[1],
        tokens,
        window,
        time.perf_counter() - started,
        memory.growth,
    )
