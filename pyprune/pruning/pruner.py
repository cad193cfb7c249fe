"""One run of `prune` over the neurons of a model: scores, widths, repairs and cuts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..base.errors import InputError
from ..base.machine import products
from ..base.memory import release
from ..base.progress import Progress
from ..base.statistics import ActivationStats, GradientStats
from ..model import surgery
from ..model.described import Described
from ..model.families import FFN
from ..model.mask import KeepIndex
from ..speed import latency
from ..speed.latency import LatencyTable
from . import gradients, importance, sensitivity
from .calibration import LayerStream
from .mixture import Windows
from .options import PruneOptions
from .repair import Fitted, Layer
from .repair.least_squares import warn_of_dead
from .sensitivity import SensitivityCurves

# Calibration tokens that the curves of layers are taken from, at most.
CURVE_TOKENS = 16_384


@dataclass
class LayerReport:
    """What pruning did to one FFN.

    Attributes:
        layer: its number.
        before, after: neurons.
        error_cut, error_repaired: squared error of the FFN's output over the calibration tokens relative to the
            squared dense output, for the bare cut and after least squares; None where not measured.
        error_refit: after the rows were fitted by gradient, on the held-out quarter of the tokens; None as above.
        damping: ridge of the least-squares fit; None where there was none.
        dead: neurons that never were active on the calibration text; None where nobody looked.
    """

    layer: int
    before: int
    after: int
    error_cut: float | None = None
    error_repaired: float | None = None
    error_refit: float | None = None
    damping: float | None = None
    dead: int | None = None


class Pruner:
    """What one run does to the neurons of a model; to an allocation, the layers of the dense one (`allocation.Layers`).

    Args:
        described: a causal LM of Transformers, in eval mode.
        options: what to do.
        windows: of calibration tokens, or None where none are needed.
        progress: called as `(stage, done, total)`.
    """

    def __init__(
        self, described: Described, options: PruneOptions, windows: Windows | None, progress: Progress
    ) -> None:
        self.described, self.options, self.progress = described, options, progress
        self.ids = None if windows is None else windows.ids
        self.sources = None if windows is None else windows.sources
        self.ffns, self.sizes = described.ffns, described.sizes
        self.criterion = importance.get(options.method)
        self.reports: list[LayerReport] = []
        self._share = options.repair.share
        self._gradients: list[GradientStats] | None = None
        self._scores: list[Tensor] = []
        self._curves: dict[int, SensitivityCurves] = {}

    def gradients(self) -> list[GradientStats] | None:
        """How the dense model's loss depends on its FFNs, where the criterion asks; collected once."""
        needs = self.criterion.needs
        if self._gradients is None and needs & {"gradients", "gradients2"} and self.ids is not None:
            parts = {"parts": True, "parts_square": "gradients2" in needs}
            model = self.described.model
            self._gradients = gradients.collect(model, self.ffns, self.ids, progress=self.progress, **parts)
        return self._gradients

    def score(self, ffn: FFN, stats: ActivationStats | None) -> Tensor:
        """`[F]` scores of one FFN's neurons."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + ffn.layer)
        found = self.gradients()
        if found is not None and stats is not None:
            stats = replace(stats, gradients=found[ffn.layer])
        return self.criterion(ffn.weights(), stats, generator)

    def stream(self, twin: bool = False) -> LayerStream:
        """The calibration text in front of the first layer."""
        assert self.ids is not None
        self.progress("embedding the calibration text", 0, 1)
        model = self.described.model
        multiplied = products(self.options.precision, next(model.parameters()).device)
        return LayerStream(model, self.ffns, self.ids, twin, self.sources, multiplied)

    def scores(self) -> list[Tensor]:
        """`[F]` scores of every layer of the dense model, computed once."""
        if self._scores:
            return self._scores
        self.gradients()
        stream = self.stream() if self.criterion.needs else None
        scores = []
        for ffn in self.ffns:
            self.progress("scoring neurons", ffn.layer, len(self.ffns))
            gram = "gram" in self.criterion.needs
            scores.append(self.score(ffn, stream.statistics(ffn, gram) if stream else None))
            if stream:
                stream.advance()
        self.progress("scoring neurons", len(self.ffns), len(self.ffns))
        self._scores = scores
        return scores

    def curves(self, multiple: int) -> SensitivityCurves:
        """How much the loss grows when one layer alone is narrowed and repaired, computed once for a `multiple`."""
        if multiple in self._curves:
            return self._curves[multiple]
        assert self.ids is not None
        self.gradients()
        # Curves need less text than fits: of a long one, windows spread evenly.
        windows = min(len(self.ids), max(1, CURVE_TOKENS // self.ids.shape[1]))
        chosen = torch.linspace(0, len(self.ids) - 1, windows).round().long()
        self._curves[multiple] = sensitivity.curves(
            self.described,
            self.ids[chosen],
            self.score,
            kind="fisher",
            multiple=multiple,
            damping=self.options.repair.ridge,
            gram="gram" in self.criterion.needs,
            seed=self.options.seed,
            progress=self.progress,
        )
        return self._curves[multiple]

    def latencies(self, widths: Sequence[int], workload: str) -> LatencyTable:
        """What FFNs of `widths` cost on this machine, in this model."""
        parsed = latency.Workload.parse(workload)
        return latency.measure(self.described.model, widths, parsed, progress=self.progress)

    def run(self, plan: Sequence[KeepIndex | int]) -> list[KeepIndex]:
        """Prune every layer.

        Args:
            plan: the neurons that each layer keeps, or how many: then each layer is scored when it is reached.

        Returns:
            What each layer kept.

        Raises:
            InputError: scores, activations or new weights that are not finite, or too little text for a fit.
        """
        repair = self.options.repair
        widths = [p if isinstance(p, int) else len(p) for p in plan]
        scoring = self.criterion.needs and any(isinstance(p, int) for p in plan)
        narrower = any(w < size for w, size in zip(widths, self.sizes, strict=True))
        self._share = repair.share if narrower else 0.0  # where nothing is lost, nothing is made up for
        cut = [w for w, size in zip(widths, self.sizes, strict=True) if w < size or self._share]
        if self.ids is not None and cut:
            repair.check_tokens(self.ids, max(cut))
        if scoring:
            self.gradients()
        stream = self.stream(self._share > 0) if repair.needs or scoring else None
        chosen = []
        for ffn, item in zip(self.ffns, plan, strict=True):
            self.progress("pruning layers", ffn.layer, len(self.ffns))
            try:
                chosen.append(self.step(ffn, item, stream))
            except InputError as error:
                done = "; earlier layers are pruned already, so load the model again" if self.reports else ""
                raise InputError(f"layer {ffn.layer}: {error}{done}") from error
        self.progress("pruning layers", len(self.ffns), len(self.ffns))
        warn_of_dead([r.dead or 0 for r in self.reports], sum(self.sizes))
        return chosen

    def step(self, ffn: FFN, item: KeepIndex | int, stream: LayerStream | None) -> KeepIndex:
        """Prune one layer: score it if `item` is a width, fit what stays, cut, and move the text past it."""
        repair, stats = self.options.repair, None
        if stream:
            if self._share > 0:
                stream.advance_twin()
            gram = "gram" in repair.needs or ("gram" in self.criterion.needs and isinstance(item, int))
            stats = stream.statistics(ffn, gram, "held_out" in repair.needs)
        if isinstance(item, int):
            item = KeepIndex.from_scores(self.score(ffn, stats), item, f"scores of layer {ffn.layer}")
        fitted = Fitted()
        if stats is not None and stream and (len(item) < item.intermediate_size or self._share):
            fitted = repair.fit(Layer(ffn, item, stats, partial(stream.inputs, ffn), self.options.seed))
        dead = None if stats is None else int((stats.square_sum == 0).sum())
        report = LayerReport(ffn.layer, item.intermediate_size, len(item), dead=dead)
        report.error_cut, report.error_repaired = fitted.error_cut, fitted.error_repaired
        report.error_refit, report.damping = fitted.error_refit, fitted.damping
        if stream and not self.options.sequential:
            stream.advance()
        surgery.cut(ffn, item, fitted.down, fitted.bias_shift)
        if fitted.inputs is not None:
            surgery.set_inputs(ffn, fitted.inputs, fitted.input_biases or ())
        self.reports.append(report)
        if stream and self.options.sequential:
            stream.advance()
        release()
        return item
