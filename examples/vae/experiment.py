"""One dense training a seed, then every way to prune from there: before, right after the cut, after recovery."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyprune.base.errors import check
from pyprune.training import TrainingPruner, train

from .data import Batches, Data
from .measure import Measured, measure
from .model import Loss, Sizes, TextVAE
from .pruning import WAYS, Way, adam, cut

BEFORE, AFTER, RECOVERED = "before", "after pruning", "recovered"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        steps, prune_steps, recover_steps: of dense training, of pruning, and after the cut.
        keep: share of the encoder's FFN neurons that stays, in (0, 1).
        beta: weight of the past in the moving average.
        batch: strings of a step.
        rate: AdamW's, constant.
        seeds: how many runs, from other weights and other batches.
        samples: of z for each held-out string.
        multiple: widths are multiples of this.

    Raises:
        InputError: a value breaks its rule.
    """

    steps: int = 1200
    prune_steps: int = 100
    recover_steps: int = 100
    keep: float = 0.1
    beta: float = 0.95
    batch: int = 32
    rate: float = 3e-3
    seeds: int = 3
    samples: int = 2
    multiple: int = 8
    sizes: Sizes = field(default_factory=Sizes)
    loss: Loss = field(default_factory=Loss)

    def __post_init__(self) -> None:
        for name in ("steps", "prune_steps", "recover_steps", "batch", "seeds", "samples", "multiple"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, "be an integer of at least 1", value)
        check(self.prune_steps >= 2, "prune_steps", "be at least 2", self.prune_steps)
        check(0 < self.keep < 1, "keep", "lie in (0, 1)", self.keep)
        check(0 <= self.beta < 1, "beta", "lie in [0, 1)", self.beta)
        check(0 < self.rate < float("inf"), "rate", "be positive and finite", self.rate)


@dataclass(frozen=True, eq=False)
class Row:
    """What one way came to, with one seed.

    Attributes:
        after, recovered: right after the cut, and at the end.
        widths: neurons of each FFN that stayed.
    """

    after: Measured
    recovered: Measured
    widths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """All ways with one seed.

    Attributes:
        before: the dense model from which all of them start.
        dense: the same two moments of a dense model that trains on as they do.
        rows: by the name of the way.
        model: the dense one at the start of the pruning.
        compact: a pruned one, recovered: that of the first way.
    """

    before: Measured
    dense: Row
    rows: dict[str, Row]
    model: TextVAE
    compact: TextVAE


Step = Callable[[int, int], None]


def run(data: Data, plan: Plan, seed: int, progress: Step = lambda done, total: None) -> Run:
    """Train a dense model, then prune and recover copies of it; every way sees the same batches and the same noise.

    Args:
        data: the text.
        plan: what to do.
        seed: of weights, batches and noise.
        progress: called as `(trainings done, trainings in all)`.
    """
    total = 2 + len(WAYS)
    progress(0, total)
    torch.manual_seed(seed)
    model = TextVAE(plan.sizes, plan.loss)
    optimizer = adam(model, plan.rate)
    _fit(model, optimizer, data, plan, seed, 0, plan.steps)
    before = _measured(model, data, plan)
    progress(1, total)
    dense, _ = _branch(model, optimizer, data, plan, seed, None)
    progress(2, total)
    rows: dict[str, Row] = {}
    compact = model
    for done, way in enumerate(WAYS, 3):
        rows[way.name], pruned = _branch(model, optimizer, data, plan, seed, way)
        compact = pruned if way is WAYS[0] else compact
        progress(done, total)
    return Run(before, dense, rows, model, compact)


def _fit(
    model: TextVAE,
    optimizer: torch.optim.Optimizer,
    data: Data,
    plan: Plan,
    seed: int,
    first: int,
    steps: int,
    pruner: TrainingPruner | None = None,
) -> list[float]:
    """`steps` steps after the `first` ones; weights of the KL rise over the first half of the dense training."""
    places = Batches(data.train, plan.sizes.length, plan.batch, steps, seed * 3 + 1 + first, first, plan.steps // 2)
    torch.manual_seed(seed * 1_000_003 + first)  # of word dropout and z
    return train(model, places, optimizer, pruner, steps=steps, loss_fn=_loss)


def _loss(model: Any, batch: tuple[torch.Tensor, float]) -> torch.Tensor:
    loss: torch.Tensor = model.training_loss(*batch)
    return loss


def _measured(model: TextVAE, data: Data, plan: Plan) -> Measured:
    return measure(model, data.held_out, plan.samples)


def _branch(
    start: TextVAE, start_optimizer: torch.optim.AdamW, data: Data, plan: Plan, seed: int, way: Way | None
) -> tuple[Row, TextVAE]:
    """Go on from the dense model, pruned by `way` or, without one, dense."""
    model = copy.deepcopy(start)
    optimizer = adam(model, plan.rate)
    optimizer.load_state_dict(copy.deepcopy(start_optimizer.state_dict()))
    pruner = None
    if way is not None:
        config = way.config(plan.keep, plan.prune_steps, plan.beta, plan.multiple, seed)
        pruner = TrainingPruner(model.encoder, config)
    _fit(model, optimizer, data, plan, seed, plan.steps, plan.prune_steps, pruner)
    widths = (plan.sizes.width,) * plan.sizes.layers
    if pruner is not None:
        mask, optimizer = cut(model, pruner, optimizer)
        widths = mask.widths
    after = _measured(model, data, plan)
    _fit(model, optimizer, data, plan, seed, plan.steps + plan.prune_steps, plan.recover_steps)
    return Row(after, _measured(model, data, plan), widths), model
