"""Ways to prune, as data: with a share to keep and a seed, a `Recipe` is a `Setting`, one row of `compare`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..base.errors import check
from ..base.progress import Progress
from ..pruning.allocation import ALLOCATIONS
from ..pruning.blocks import BlockOptions, BlockReport, prune_blocks
from ..pruning.mixture import Windows
from ..pruning.options import ALLOCATION, METHOD, REPAIR, PruneOptions
from ..pruning.prune import PruneReport, prune
from ..pruning.text import TOKENS as ORDINARY
from ..training.recovery import RecoverConfig

# Tokens that the published methods read of the text: they only rank neurons by it (bench/notes/quality.md).
TOKENS = 32_768


@dataclass(frozen=True)
class Recipe:
    """A way to prune, but for how much and the seed.

    Attributes:
        label: for people; with keep and seed it names a row of the result.
        options: arguments of `prune` besides keep and seed, options as short forms; with `structure`, of
            `prune_blocks`.
        group: `published`, `ours` or `grid`.
        protected: how many first and last layers keep all neurons, and of how many layers that was published.
        tokens: calibration tokens at most; 0 for all there are.
        recovery: how the dense model teaches the pruned one afterwards; None: it does not.
    """

    label: str
    options: Mapping[str, Any]
    group: str = "grid"
    protected: tuple[int, int, int] | None = None
    tokens: int = 0
    recovery: RecoverConfig | None = None

    def fitted(self, layers: int, multiple: int) -> dict[str, Any]:
        """The options for a model of so many layers: what is protected keeps its share of the depth, rounded.

        Raises:
            InputError: an unknown allocation, or one without these options.
        """
        if "structure" in self.options:
            return dict(self.options)
        more: dict[str, Any] = {"multiple": multiple}
        if self.protected is not None:
            *ends, depth = self.protected
            more["protect"] = tuple(round(end * layers / depth) for end in ends)
        allocation = ALLOCATIONS.parse(self.options.get("allocation", "uniform"), **more)
        return {**self.options, "allocation": str(allocation)}


_PLAIN = {"allocation": "uniform", "repair": "none"}

# Every method with the allocation and the compensation that it was published with. All get the same calibration text
# and only FFNs are pruned; the papers differ in both.
_PUBLISHED = (
    Recipe("random", {"method": "random", **_PLAIN}, "published"),
    # The L2 norm over all weights of a neuron.
    Recipe("magnitude", {"method": "magnitude-l2-both", **_PLAIN}, "published"),
    # Layer by layer, each scored on what the pruned ones before it give.
    Recipe("Wanda-sp", {"method": "wanda", **_PLAIN, "sequential": True}, "published"),
    # One ranking of standardised scores over all layers; every statistic is that of the dense model.
    Recipe("FLAP", {"method": "flap", "allocation": "global", "repair": "bias", "sequential": False}, "published"),
    # In LLaMA-7B layers 4 to 29 of 32 are pruned, all by the same share.
    Recipe("LLM-Pruner Taylor", {"method": "taylor-element", **_PLAIN}, "published", protected=(4, 2, 32)),
    Recipe("Fisher of masks", {"method": "fisher", **_PLAIN}, "published"),
    Recipe("OBD", {"method": "obd", **_PLAIN}, "published"),
    # Whole layers by block influence, their attention with them.
    Recipe("ShortGPT (whole layers)", {"structure": "layer"}, "published"),
)

PUBLISHED = tuple(replace(recipe, tokens=TOKENS) for recipe in _PUBLISHED)

_OURS = {"method": METHOD, "allocation": ALLOCATION, "repair": REPAIR}
# What `pyprune prune` does, and what it does with --best.
OURS = (
    Recipe("pyprune", _OURS, "ours", tokens=ORDINARY),
    Recipe("pyprune --best", _OURS, "ours", recovery=RecoverConfig()),
)


def grid(criteria: Iterable[str], repairs: Iterable[str], allocations: Iterable[str]) -> tuple[Recipe, ...]:
    """Every combination. One that cannot be makes a row with the reason."""
    return tuple(
        Recipe(f"{m} | {r} | {a}", {"method": m, "repair": r, "allocation": a})
        for m, r, a in itertools.product(criteria, repairs, allocations)
    )


@dataclass(frozen=True)
class Setting:
    """One row to measure.

    Attributes:
        label, group, tokens, recovery: of the `Recipe`.
        keep: share of neurons that stays.
        seed: of everything random.
        options: the other arguments of `prune`, or with `structure` of `prune_blocks`.
    """

    label: str
    keep: float
    options: Mapping[str, Any]
    group: str = "grid"
    seed: int = 0
    tokens: int = 0
    recovery: RecoverConfig | None = None

    @property
    def published(self) -> bool:
        return self.group == "published"

    @property
    def name(self) -> tuple[str, float, int]:
        """What tells rows apart."""
        return self.label, self.keep, self.seed

    def chosen(self) -> PruneOptions | BlockOptions:
        """The options; made when its row is reached, so that options that break a rule cost one row.

        Raises:
            InputError: they do.
        """
        if "structure" in self.options:
            return BlockOptions.of(keep=self.keep, **self.options)
        return PruneOptions.of(self.keep, seed=self.seed, **self.options)

    def run(self, model: nn.Module, text: Windows, progress: Progress) -> PruneReport | BlockReport:
        """Prune `model`, in place. Errors as `prune`."""
        if "structure" in self.options:
            return prune_blocks(model, keep=self.keep, text=text, progress=progress, **self.options)
        return prune(model, self.keep, seed=self.seed, text=text, progress=progress, **self.options)


def settings(
    recipes: Iterable[Recipe], keeps: Sequence[float], layers: int, multiple: int = 16, seeds: int = 3
) -> list[Setting]:
    """The rows of recipes x keeps. The random method gets one for each seed from 0.

    Args:
        recipes: with labels that differ.
        keeps: shares of neurons that stay, in (0, 1].
        layers: of the model.
        multiple: widths are rounded to it. The finer, the nearer are all methods to the same size.
        seeds: how many.

    Raises:
        InputError: no recipe or keep, one given twice, a keep out of range, no seed, or an unknown allocation.
    """
    recipes = list(recipes)
    labels = [r.label for r in recipes]
    check(0 < len(labels) == len(set(labels)), "settings", "be some, with labels that differ", labels)
    right = 0 < len(keeps) == len(set(keeps)) and all(0 < keep <= 1 for keep in keeps)
    check(right, "keep", "be shares in (0, 1] that differ", list(keeps))
    check(seeds >= 1, "seeds", "be at least 1", seeds)
    return [
        Setting(r.label, keep, r.fitted(layers, multiple), r.group, seed, r.tokens, r.recovery)
        for r in recipes
        for keep in keeps
        for seed in range(seeds if r.options.get("method") == "random" else 1)
    ]
