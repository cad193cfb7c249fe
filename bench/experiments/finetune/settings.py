"""One run, named by everything that decides its result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .recipes import KEEPS, METHODS, SEEDS

# Trained on for as many steps, and not pruned: what the steps alone do.
DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """Task, model and size choose a recipe; the rest chooses the run.

    Attributes:
        method: of `pyprune.training`, or `dense`.
        keep: share of neurons that stays; 1 for `dense`.
        distilled: whether the dense model that learned the task is the teacher.
        seed: of the order of the data, of dropout and of whatever the method draws.
    """

    task: str
    model: str
    size: str
    method: str
    keep: float
    distilled: bool
    seed: int

    @property
    def key(self) -> str:
        """For example `e2e/scratch/cpu/gum/0.3/distilled/0`."""
        how = "distilled" if self.distilled else "plain"
        return f"{self.task}/{self.model}/{self.size}/{self.method}/{self.keep:g}/{how}/{self.seed}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def grid(
    task: str,
    model: str,
    size: str,
    methods: Iterable[str] = METHODS,
    keeps: Iterable[float] = KEEPS,
    seeds: Iterable[int] = SEEDS,
    distilled: Iterable[bool] = (False, True),
) -> list[Setting]:
    """All settings, seed by seed and keep by keep, so that a run cut short still compares whole rows."""
    cells = list(itertools.product(sorted(keeps, reverse=True), distilled, methods))
    settings = []
    for seed in seeds:
        settings.append(Setting(task, model, size, DENSE, 1.0, False, seed))
        for keep, how, method in cells:
            settings.append(Setting(task, model, size, method, keep, how, seed))
    return settings
