"""The widths that a predictor of the loss, fitted to measured samples, finds best, and that are best when measured.

Ji et al. 2023 sample pruned architectures, measure each, fit gradient boosted trees from the layers' sparsities to the
accuracy, and take the best prediction among many random architectures. Here the measure is the loss of the narrowed
model on a few windows of every source of calibration text, all samples spend the same budget, and the predictor is a
ridge regression that is a sum over layers (`predictor`), so that the search is exact and no draw. Samples take turns
with the windows, each is compared with the even spread on the same ones, and so the fit sees much text at the price of
little. The best few, the even spread and the best sample are measured on all of these windows, and the best of them
wins. Unlike curves of single layers this sees layers narrowed together; it sees them without repair.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...base.errors import check, is_count
from ...model.units import Expert, groups, whole_rows
from . import bounds
from .base import ALLOCATIONS, Floored, Layers, Plan
from .masked_loss import MaskedLoss, turns, windows_by_source
from .predictor import fit, search
from .samples import Widths, draw

STAGE = "measuring samples of widths"
_TURNS = 8  # groups of windows, of which a sample sees one


@ALLOCATIONS.add
@dataclass(frozen=True, kw_only=True)
class Predicted(Floored):
    """The widths that a predictor fitted to measured samples finds best. Fields: see `Allocation` and `Floored`.

    Attributes:
        samples: widths that are measured, more than there are layers to narrow. A sample costs a pass over `windows`
            windows of every source.
        windows: of every source, for a sample; eight times as many in all.
        verify: predictions that are measured on all of them.
        draws: seed of the samples.
    """

    NAME = "predictor"
    SUMMARY = "the widths that a predictor finds best, fitted to the losses of samples, and that are best when measured"
    SOURCE = "Ji et al. 2023, arXiv 2309.09507, section 3; here by ridge regression"
    NEEDS_TEXT = True

    samples: int = 128
    windows: int = 1
    verify: int = 3
    draws: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "windows", "verify"):
            value = getattr(self, name)
            check(is_count(value) and value >= 1, name, "be a positive integer", value)
        check(is_count(self.draws), "draws", "be a non-negative integer", self.draws)

    def plan(self, layers: Layers, keep: float) -> Plan:
        # The experts of a layer have one width, and are one layer here of the width of all.
        every = groups(layers.described.ffns)
        counts, single = [len(group) for group in every], [group[0].intermediate_size for group in every]
        rows = bounds.candidate_widths(single, self.multiple, self.floor, self.protect)
        for i, group in enumerate(every):
            if isinstance(group[0], Expert):
                rows[i] = whole_rows(rows[i])
        sizes = [n * size for n, size in zip(counts, single, strict=True)]
        choices = [[n * width for width in row] for n, row in zip(counts, rows, strict=True)]

        def each(widths: Widths) -> list[int]:
            return [width // n for width, n in zip(widths, counts, strict=True) for _ in range(n)]

        budget, least = round(keep * sum(sizes)), sum(row[0] for row in choices)
        rule = f"be at least {least / sum(sizes):.3f} with this multiple, floor and protect, or no sample meets it"
        check(least <= budget, "keep", rule, keep)
        if budget >= sum(sizes):
            return Plan(layers.sizes)
        free = sum(len(row) > 1 for row in choices)
        rule = f"be more than the layers that may be narrowed ({free}), or no predictor can be fitted"
        check(self.samples > free, "samples", rule, self.samples)
        samples = draw(choices, budget, self.samples, self.draws)
        rule = (
            f"leave more than {free} ways to spread a share of {keep} over {free} layers, with this floor and protect; "
            f"{len(samples)} were found"
        )
        check(len(samples) > free, "multiple", rule, self.multiple)
        assert layers.ids is not None
        own = windows_by_source(layers.ids, layers.sources, self.windows * _TURNS)
        scores = layers.scores()
        losses = [MaskedLoss(layers.described, scores, group) for group in turns(own, self.windows, _TURNS)]
        even = [loss(each(samples[0])) for loss in losses]
        mine: list[tuple[int, float]] = []
        for number in range(1 + layers.ranks.rank, len(samples), layers.ranks.size):
            layers.progress(STAGE, number, len(samples))
            mine.append((number, losses[number % _TURNS](each(samples[number])) - even[number % _TURNS]))
        growth = [0.0, *(value for _, value in sorted(row for rows in layers.ranks.gather(mine) for row in rows))]
        found = search(fit(sizes, samples, growth), choices, samples, budget, self.verify)
        layers.progress(STAGE, len(samples), len(samples))
        finalists: list[Widths] = [samples[growth.index(min(growth))], *found]
        verified = {widths: sum(loss(each(widths)) for loss in losses) for widths in dict.fromkeys(finalists)}
        best = min(verified, key=verified.__getitem__)
        return Plan(each(best if verified[best] < sum(even) else samples[0]))
