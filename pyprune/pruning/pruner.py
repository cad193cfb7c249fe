"""One run of `prune` over the neurons of a model: scores, widths, repairs and cuts, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..base.errors import InputError, UnsupportedModelError, check
from ..base.machine import products
from ..base.memory import release
from ..base.progress import Progress
from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats, GradientStats
from ..model import surgery
from ..model.described import Described
from ..model.families import FFN
from ..model.mask import KeepIndex
from ..model.units import Expert, groups, tied
from ..speed import latency
from ..speed.latency import LatencyTable
from . import gradients, importance, sensitivity
from .allocation.base import Plan
from .batches import Batch, as_windows, of_windows
from .calibration import LayerStream
from .decided import Decided, LayerReport, everyone, same_keep
from .mixture import Windows
from .options import PruneOptions
from .repair import Fitted, Layer
from .repair.least_squares import warn_of_dead
from .sensitivity import SensitivityCurves
from .whole import WholeForwards

# Calibration tokens that the curves of layers are taken from, at most.
CURVE_TOKENS = 16_384
# Of errors after some layers were pruned.
_BEGUN = "; earlier layers are pruned already, so load the model again"
# An expert that saw fewer is scored by its weights, and is not repaired.
LEAST_TOKENS, BY_WEIGHTS = 32, "magnitude-l2-both"


class Pruner:
    """What one run does to the neurons of a model; to an allocation, the layers of the dense one (`allocation.Layers`).

    Args:
        described: a causal LM of Transformers, in eval mode.
        options: what to do.
        windows: of calibration tokens, or None where none are needed.
        progress: called as `(stage, done, total)`.
        batches: instead of windows.
        ranks: processes that do this together: windows are shared out, and so are the experts of a layer and the
            columns of a fit; what one rank decides, all do.
    """

    def __init__(
        self,
        described: Described,
        options: PruneOptions,
        windows: Windows | None,
        progress: Progress,
        batches: list[Batch] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.described, self.options, self.progress, self.ranks = described, options, progress, ranks
        self.ids = None if windows is None else windows.ids
        self.batches = batches
        self.sources = None if windows is None else windows.sources
        self.ffns, self.sizes = described.ffns, described.sizes
        self.criterion = importance.get(options.method)
        self.reports: list[LayerReport] = []
        self._share = options.repair.share
        self._gradients: list[GradientStats] | None = None
        self._scores: list[Tensor] = []
        self._curves: dict[int, SensitivityCurves] = {}
        self.few: dict[str, int] = {}  # experts that saw too few tokens, and how many

    def gradients(self) -> list[GradientStats] | None:
        """How the dense model's loss depends on its FFNs, where the criterion asks; collected once."""
        needs = self.criterion.needs
        if self._gradients is None and needs & {"gradients", "gradients2"}:
            if getattr(self.described.model.config, "is_encoder_decoder", False):
                kind = type(self.described.model).__name__
                raise UnsupportedModelError(
                    f"method {self.criterion.name!r} needs gradients of a language model's loss, which are not taken "
                    f"of {kind}, an encoder-decoder: use a method of activations or weights"
                )
            given = self.ids is not None
            check(given, "text", f"be windows of token ids for method {self.criterion.name!r}", "batches")
            assert self.ids is not None
            how: dict[str, Any] = {"parts": True, "parts_square": "gradients2" in needs, "ranks": self.ranks}
            model = self.described.model
            self._gradients = gradients.collect(model, self.ffns, self.ids, progress=self.progress, **how)
        return self._gradients

    def score(self, ffn: FFN, stats: ActivationStats | None) -> Tensor:
        """`[F]` scores of one FFN's neurons; of an expert that saw too few tokens, by its weights alone."""
        if stats is not None and ffn.expert and stats.tokens < LEAST_TOKENS and self.criterion.needs:
            self.few[ffn.name] = stats.tokens
            return importance.get(BY_WEIGHTS)(ffn.weights())
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + ffn.layer)
        found = self.gradients()
        if found is not None and stats is not None:
            stats = replace(stats, gradients=found[ffn.layer])
        return self.criterion(ffn.weights(), stats, generator)

    def stream(self, twin: bool = False) -> LayerStream | WholeForwards:
        """The calibration text in front of the first layer; or where it cannot go layer by layer, in front of all."""
        self.progress("embedding the calibration text", 0, 1)
        model = self.described.model
        if self.batches is not None:
            return WholeForwards(model, self.batches, self.ranks)
        assert self.ids is not None
        multiplied = products(self.options.precision, next(model.parameters()).device)
        if self.described.streamed:
            try:
                return LayerStream(model, self.ffns, self.ids, twin, self.sources, multiplied, self.ranks)
            except UnsupportedModelError:
                if twin:
                    raise
        encodes = getattr(model.config, "is_encoder_decoder", False)
        return WholeForwards(model, of_windows(self.ids, encodes), self.ranks)

    def scores(self) -> list[Tensor]:
        """`[F]` scores of every FFN of the dense model, computed once."""
        if self._scores:
            return self._scores
        self.gradients()
        stream = self.stream() if self.criterion.needs else None
        scores = []
        for group in groups(self.ffns):
            self.progress("scoring neurons", group[0].layer, len(self.ffns))
            stats: Sequence[ActivationStats | None] = [None] * len(group)
            if stream:
                stream.reach(group[0])
                stats = stream.group_statistics(group, "gram" in self.criterion.needs)
            scores += self._agreed(group, stats)
        self.progress("scoring neurons", len(self.ffns), len(self.ffns))
        self._scores = scores
        return scores

    def _agreed(self, group: list[FFN], stats: Sequence[ActivationStats | None]) -> list[Tensor]:
        """The scores of a group's FFNs, each by one rank."""
        ranks = self.ranks
        mine = {
            ffn.name: self.score(ffn, one)
            for number, (ffn, one) in enumerate(zip(group, stats, strict=True))
            if number % ranks.size == ranks.rank
        }
        found = ranks.exchange(mine, self.described.device) if ranks.several else mine
        return [found[ffn.name] for ffn in group]

    def curves(self, multiple: int) -> SensitivityCurves:
        """How much the loss grows when one layer alone is narrowed and repaired, computed once for a `multiple`."""
        if multiple in self._curves:
            return self._curves[multiple]
        self.described.check_layered(f"allocation {self.options.allocation.NAME!r}")
        check(self.ids is not None, "text", "be windows of token ids for curves of layers", "batches")
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
            ranks=self.ranks if len(chosen) >= self.ranks.size else ALONE,
        )
        return self._curves[multiple]

    def latencies(self, widths: Sequence[int], workload: str) -> LatencyTable:
        """What FFNs of `widths` cost on this machine, in this model."""
        what = f"allocation {self.options.allocation.NAME!r}"
        if self.described.experts:
            raise UnsupportedModelError(
                f"{what} does not take experts in tensors: what a step costs depends on the experts that its tokens "
                f"are routed to, not on widths alone, as in {self.described.experts[0].group}; use allocation "
                "'sensitivity' or 'uniform', and `pyprune bench` for what is gained"
            )
        self.described.check_plain(what)
        parsed = latency.Workload.parse(workload)

        def measure() -> LatencyTable:
            return latency.measure(self.described.model, widths, parsed, progress=self.progress)

        return self.ranks.first(measure, lambda table: ({}, table.to_json()), lambda _, t: LatencyTable.from_json(t))

    def agreed(self, plan: Plan) -> Plan:
        """The first rank's plan, on every one: what was measured or rounded elsewhere may differ."""

        def pack(plan: Plan) -> tuple[dict[str, Tensor], Any]:
            keeps = {str(i): k.neurons for i, k in enumerate(plan.layers) if isinstance(k, KeepIndex)}
            return keeps, [plan.promise, [k if isinstance(k, int) else None for k in plan.layers]]

        def unpack(keeps: dict[str, Tensor], facts: Any) -> Plan:
            widths = zip(facts[1], self.sizes, strict=True)
            layers: Any = [KeepIndex(keeps[str(i)], size) if w is None else w for i, (w, size) in enumerate(widths)]
            return Plan(layers, facts[0])

        return self.ranks.first(lambda: plan, pack, unpack)

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
        plan = self._tied(plan)
        widths = [p if isinstance(p, int) else len(p) for p in plan]
        scoring = self.criterion.needs and any(isinstance(p, int) for p in plan)
        narrower = any(w < size for w, size in zip(widths, self.sizes, strict=True))
        self._share = repair.share if narrower else 0.0  # where nothing is lost, nothing is made up for
        cut = [w for w, size in zip(widths, self.sizes, strict=True) if w < size or self._share]
        counted = self.ids if self.batches is None else as_windows(self.batches)
        if counted is not None and cut:
            repair.check_tokens(counted, max(cut))
        if scoring:
            self.gradients()
        stream = self.stream(self._share > 0) if repair.needs or scoring else None
        chosen: list[KeepIndex] = []
        for stage in self._stages(stream):
            self.progress("pruning layers", len(chosen), len(self.ffns))
            try:
                if (kept := self.enter(stage)) is not None:
                    chosen += kept
                    continue
                ready = [self._ready(group, plan, stream) for group in stage]
                if stream and not self.options.sequential:
                    stream.advance()
                if not chosen:  # not before: until here an error leaves the model as it was
                    repair.prepare(self.described)
                for group, fitted in zip(stage, ready, strict=True):
                    chosen += self._cut(group, fitted)
                self.leave(stage, chosen, stream)
            except InputError as error:
                raise InputError(f"layer {stage[0][0].layer}: {error}{self.begun}") from error
        self.progress("pruning layers", len(self.ffns), len(self.ffns))
        warn_of_dead([r.dead or 0 for r in self.reports if r.tokens is None], sum(self.sizes))
        self._warn_of_few()
        return chosen

    def enter(self, stage: list[list[FFN]]) -> list[KeepIndex] | None:
        """Before a stage is pruned: what it kept, where that was done by an earlier process; else None."""
        return None

    def leave(self, stage: list[list[FFN]], chosen: list[KeepIndex], stream: Any) -> None:
        """After a stage was cut; `chosen` is what all layers so far kept."""

    @property
    def begun(self) -> str:
        """What errors add once layers were pruned."""
        return _BEGUN if self.reports else ""

    def _tied(self, plan: Sequence[KeepIndex | int]) -> list[KeepIndex | int]:
        """The same with one width for the experts of a layer (`units.tied`)."""
        widths = [len(p) if isinstance(p, KeepIndex) else p for p in plan]
        wanted = tied(self.ffns, widths)
        found = list(plan)
        for ffn, width, item in zip(self.ffns, wanted, plan, strict=True):
            if not isinstance(item, KeepIndex):
                found[ffn.layer] = width
            elif len(item) != width:
                found[ffn.layer] = KeepIndex.from_scores(self._scores[ffn.layer], width, f"scores of {ffn.name}")
        return found

    def _stages(self, stream: LayerStream | WholeForwards | None) -> list[list[list[FFN]]]:
        """Groups whose statistics are all taken before the first of them is cut."""
        every = groups(self.ffns)
        if stream is None or self.options.sequential:
            return [[group] for group in every]
        if isinstance(stream, WholeForwards):
            return [every]
        blocks: dict[int, list[list[FFN]]] = {}
        for group in every:
            blocks.setdefault(group[0].block, []).append(group)
        return list(blocks.values())

    def _ready(
        self, group: list[FFN], plan: list[KeepIndex | int], stream: LayerStream | WholeForwards | None
    ) -> list[tuple[KeepIndex, Fitted]]:
        """What each FFN of a group keeps, scored if the plan has a width, and the rows fitted for it."""
        repair, items = self.options.repair, [plan[ffn.layer] for ffn in group]
        stats: Sequence[ActivationStats | None] = [None] * len(group)
        if stream:
            stream.reach(group[0])
            unscored = any(isinstance(item, int) for item in items)
            gram = "gram" in repair.needs or ("gram" in self.criterion.needs and unscored)
            stats = stream.group_statistics(group, gram, "held_out" in repair.needs)
        ranks, made = self.ranks, []
        for number, (ffn, item, one) in enumerate(zip(group, items, stats, strict=True)):
            if len(group) == 1 or number % ranks.size == ranks.rank:
                made.append(self._decide(ffn, item, one, stream, ranks if len(group) == 1 else ALONE))
        decided = everyone(ranks, made, self.sizes, self.described.device)
        for what in decided:
            self.reports.append(what.report)
            if what.few is not None:
                self.few[self.ffns[what.report.layer].name] = what.few
        return [(what.keep, what.fitted) for what in decided]

    def _decide(
        self,
        ffn: FFN,
        item: KeepIndex | int,
        stats: ActivationStats | None,
        stream: LayerStream | WholeForwards | None,
        ranks: Ranks,
    ) -> Decided:
        """What an FFN keeps and becomes; the work of a fit is shared out among `ranks`."""
        if isinstance(item, int):
            item = KeepIndex.from_scores(self.score(ffn, stats), item, f"scores of layer {ffn.layer}")
            item = same_keep(ranks, item)
        fitted = Fitted()
        moves = len(item) < item.intermediate_size or self._share
        if stats is not None and stream and moves and self._enough(ffn, stats, len(item)):
            inputs = partial(stream.inputs, ffn)
            fitted = self.options.repair.fit(Layer(ffn, item, stats, inputs, self.options.seed, ranks))
        dead = None if stats is None else int((stats.square_sum == 0).sum())
        report = LayerReport(ffn.layer, item.intermediate_size, len(item), dead=dead)
        report.error_cut, report.error_repaired = fitted.error_cut, fitted.error_repaired
        report.error_refit, report.damping = fitted.error_refit, fitted.damping
        if stats is not None and ffn.expert:
            report.tokens = stats.tokens
        return Decided(item, fitted, report, self.few.get(ffn.name))

    def _enough(self, ffn: FFN, stats: ActivationStats, width: int) -> bool:
        """Whether an FFN saw enough tokens for a repair of `width` neurons; experts need not, and are noted."""
        if not ffn.expert:
            check(stats.tokens > 0, f"text for {ffn.name}", "reach it with a token at least", 0)
            return True
        needed = max(LEAST_TOKENS, width if "gram" in self.options.repair.needs else 0)
        halves = stats.seen is None or 0 < stats.seen.tokens < stats.tokens  # tokens to fit, and tokens to choose by
        if self.options.repair.needs and (stats.tokens < needed or not halves):
            self.few[ffn.name] = stats.tokens
            return False
        return True

    def _warn_of_few(self) -> None:
        if self.few:
            shown = ", ".join(f"{name} ({count})" for name, count in list(self.few.items())[:5])
            warnings.warn(
                f"{len(self.few)} experts saw too few calibration tokens for what was asked, and are pruned by their "
                f"weights or keep their rows as they are: {shown}{', ...' if len(self.few) > 5 else ''}",
                stacklevel=5,
            )

    def _cut(self, group: list[FFN], ready: list[tuple[KeepIndex, Fitted]]) -> list[KeepIndex]:
        """Cut the FFNs of a group; the text has not moved past it."""
        keeps = [keep for keep, _ in ready]
        experts = [ffn for ffn in group if isinstance(ffn, Expert)]
        if experts:
            surgery.cut_experts(experts, keeps, [f.down for _, f in ready], [f.bias_shift for _, f in ready])
        for ffn, (keep, fitted) in zip(group, ready, strict=True):
            if not experts:
                surgery.cut(ffn, keep, fitted.down, fitted.bias_shift)
            if fitted.inputs is not None:
                surgery.set_inputs(ffn, fitted.inputs, fitted.input_biases or ())
        release()
        return keeps
