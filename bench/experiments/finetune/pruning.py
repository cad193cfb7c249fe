"""The fine-tuning of a run: `pyprune.training` on one side, its distillation on the other."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyprune.training import TrainingConfig, TrainingPruner, methods, train
from pyprune.training.distillation import attach
from pyprune.training.loop import model_loss

from .dense import adamw, forward, learning_rate
from .recipes import Recipe
from .settings import DENSE, Setting


def training_config(setting: Setting, recipe: Recipe) -> TrainingConfig:
    """What the setting asks of `pyprune.training`; scope, penalties and all else are each method's own."""
    method = methods.parse(setting.method)
    if isinstance(method, methods.Movement):
        method = replace(method, optimizer=recipe.score_optimizer, score_rate=recipe.score_rate)
    if isinstance(method, methods.L0):
        method = replace(method, score_rate=recipe.gate_rate, multiplier_rate=recipe.multiplier_rate)
    return TrainingConfig(
        method=method,
        keep=setting.keep,
        steps=recipe.steps,
        warmup=round(recipe.warmup * recipe.steps),
        cooldown=round(recipe.cooldown * recipe.steps),
        seed=setting.seed,
    )


def fine_tune(
    model: Any, data: Iterable[dict[str, Tensor]], setting: Setting, recipe: Recipe, teacher: Any = None
) -> list[float]:
    """Train `model` in place for the recipe's steps, and prune it unless the method is `dense`; it is compact then.

    Args:
        model: the start.
        data: the recipe's number of batches.
        setting, recipe: of the run.
        teacher: the dense model that learned the task, to distil from; None for none.

    Returns:
        The loss of every step.
    """
    optimizer = adamw(model, recipe.rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe.steps, 1.0))
    pruner = None if setting.method == DENSE else TrainingPruner(model, training_config(setting, recipe))

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        with forward(model, recipe.precision):
            return model_loss(model, batch)

    with attach(model, teacher) if teacher is not None else nullcontext():
        losses = train(model, list(data), optimizer, pruner, steps=recipe.steps, scheduler=scheduler, loss_fn=loss)
    if pruner:
        pruner.finish()
    model.eval()
    return losses
