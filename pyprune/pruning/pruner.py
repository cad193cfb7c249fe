"""One run of `prune` over the neurons of a model: scores, widths, repairs and cuts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..base.errors import InputError
from ..base.memory import release
from ..base.progress import Progress
from ..base.statistics import ActivationStats, GradientStats
from ..model import surgery
from ..model.families import FFN
from ..model.mask import KeepIndex
from ..speed import latency
from ..speed.latency import LatencyTable
from . import gradients, importance, sensitivity
from .allocation import bounds
from .calibration import LayerStream
from .config import PruneConfig
from .importance.obs import DAMPING
from .repair.least_squares import check_tokens, least_squares, warn_of_dead
from .repair.mean_bias import mean_bias
from .repair.refit import Fitted, refit
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
    """What one run does to the neurons of a model.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ffns: its FFNs.
        config: what to do.
        ids: `[N, W]` calibration tokens, or None where none are needed.
        progress: called as `(stage, done, total)`.
    """

    def __init__(
        self, model: nn.Module, ffns: list[FFN], config: PruneConfig, ids: Tensor | None, progress: Progress
    ) -> None:
        self.model, self.ffns, self.config, self.ids, self.progress = model, ffns, config, ids, progress
        self.criterion = importance.get(config.method)
        self.sizes = [ffn.intermediate_size for ffn in ffns]
        self.reports: list[LayerReport] = []
        self._gradients: list[GradientStats] | None = None

    def gradients(self) -> list[GradientStats] | None:
        """How the dense model's loss depends on its FFNs, where the criterion asks; collected once."""
        needs = self.criterion.needs
        if self._gradients is None and needs & {"gradients", "gradients2"} and self.ids is not None:
            parts = {"parts": True, "parts_square": "gradients2" in needs}
            self._gradients = gradients.collect(self.model, self.ffns, self.ids, progress=self.progress, **parts)
        return self._gradients

    def scores(self, ffn: FFN, stats: ActivationStats | None) -> Tensor:
        """`[F]` scores of one FFN's neurons."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + ffn.layer)
        found = self.gradients()
        if found is not None and stats is not None:
            stats = replace(stats, gradients=found[ffn.layer])
        return self.criterion(ffn.weights(), stats, generator)

    def stream(self, twin: bool = False) -> LayerStream:
        """The calibration text in front of the first layer."""
        assert self.ids is not None
        self.progress("embedding the calibration text", 0, 1)
        return LayerStream(self.model, self.ffns, self.ids, twin)

    def all_scores(self) -> list[Tensor]:
        """Scores of every layer of the dense model."""
        self.gradients()
        stream = self.stream() if self.criterion.needs else None
        scores = []
        for ffn in self.ffns:
            self.progress("scoring neurons", ffn.layer, len(self.ffns))
            gram = "gram" in self.criterion.needs
            scores.append(self.scores(ffn, stream.statistics(ffn, gram) if stream else None))
            if stream:
                stream.advance()
        self.progress("scoring neurons", len(self.ffns), len(self.ffns))
        return scores

    def curves(self) -> SensitivityCurves:
        """How much the loss grows when one layer alone is narrowed, repaired as the configuration repairs."""
        assert self.ids is not None
        self.gradients()
        # Curves need less text than fits: of a long one, windows spread evenly.
        windows = min(len(self.ids), max(1, CURVE_TOKENS // self.ids.shape[1]))
        chosen = torch.linspace(0, len(self.ids) - 1, windows).round().long()
        return sensitivity.curves(
            self.model,
            self.ffns,
            self.ids[chosen],
            self.scores,
            kind="fisher",
            multiple=self.config.multiple,
            repair=self.config.fits,
            damping=self.config.damping or DAMPING,
            gram="gram" in self.criterion.needs,
            seed=self.config.seed,
            progress=self.progress,
        )

    def latencies(self) -> LatencyTable:
        """What FFNs of the widths that may be chosen cost on this machine, in this model."""
        config = self.config
        rows = bounds.candidate_widths(self.sizes, config.multiple, config.floor, config.protect)
        workload = latency.Workload.parse(config.workload)
        return latency.measure(self.model, sorted({w for row in rows for w in row}), workload, progress=self.progress)

    def run(self, plan: Sequence[KeepIndex | int]) -> list[KeepIndex]:
        """Prune every layer.

        Args:
            plan: the neurons that each layer keeps, or how many: then each layer is scored when it is reached.

        Returns:
            What each layer kept.

        Raises:
            InputError: scores, activations or new weights that are not finite, or too little text for a fit.
        """
        config = self.config
        widths = [p if isinstance(p, int) else len(p) for p in plan]
        scoring = self.criterion.needs and any(isinstance(p, int) for p in plan)
        self.check_tokens(widths)
        if scoring:
            self.gradients()
        stream = self.stream(config.target > 0) if config.compensate != "none" or scoring else None
        if stream and config.target > 0:
            stream.check_additive(self.ffns[0])
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

    def check_tokens(self, widths: Sequence[int]) -> None:
        """Raise `InputError` when there are fewer calibration tokens than neurons to fit."""
        cut = [w for w, size in zip(widths, self.sizes, strict=True) if w < size or self.config.target]
        if not self.config.fits or self.ids is None or not cut:
            return
        check_tokens(self.ids, max(cut), self.config.damping)

    def step(self, ffn: FFN, item: KeepIndex | int, stream: LayerStream | None) -> KeepIndex:
        """Prune one layer: score it if `item` is a width, fit what stays, cut, and move the text past it."""
        config = self.config
        stats = None
        if stream:
            if config.target > 0:
                stream.advance_twin()
            gram = config.fits or ("gram" in self.criterion.needs and isinstance(item, int))
            stats = stream.statistics(ffn, gram, config.fits and config.damping is None)
        if isinstance(item, int):
            scores = self.scores(ffn, stats)
            item = KeepIndex.from_scores(scores, item, f"scores of layer {ffn.layer}")
        report = LayerReport(ffn.layer, item.intermediate_size, len(item))
        repaired = self.repair(ffn, item, stats, stream, report)
        if stream and not config.sequential:
            stream.advance()
        surgery.cut(ffn, item, repaired.down, repaired.bias_shift)
        if repaired.inputs is not None:
            surgery.set_inputs(ffn, repaired.inputs, repaired.input_biases or ())
        self.reports.append(report)
        if stream and config.sequential:
            stream.advance()
        release()
        return item

    def repair(
        self,
        ffn: FFN,
        keep: KeepIndex,
        stats: ActivationStats | None,
        stream: LayerStream | None,
        report: LayerReport,
    ) -> Fitted:
        """New rows for the neurons that stay, as the configuration asks; `report` gets how well they fit."""
        config, weights = self.config, ffn.weights()
        kept = keep.neurons.long().to(weights.down.device)
        if stats is not None:
            report.dead = int((stats.square_sum == 0).sum())
        if stats is None or config.compensate == "none" or (len(keep) == keep.intermediate_size and not config.target):
            return Fitted()
        if config.compensate == "bias":
            removed = torch.ones(keep.intermediate_size, dtype=torch.bool, device=kept.device)
            removed[kept] = False
            return Fitted(bias_shift=mean_bias(weights.down, stats, removed))
        solved = least_squares(weights.down, stats, kept, config.damping, config.target)
        report.error_cut, report.error_repaired = solved.error_before, solved.error_after
        report.damping = solved.damping
        if config.compensate != "refit" or stream is None:
            return Fitted(down=solved.down)
        fitted = refit(ffn, kept, solved.down, *stream.inputs(ffn), target=config.target, seed=config.seed)
        report.error_refit = fitted.error
        return fitted
