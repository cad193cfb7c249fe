"""A plain training loop: the same result as `transformers.Trainer` with the callback, without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..base.errors import InputError, check
from ..base.progress import Progress, quiet
from ..base.ranks import ALONE, Ranks
from ..model.weights import is_sharded
from .pruner import TrainingPruner
from .resume import check_place, load_random_state, load_training, save_training
from .schedule import check_whole

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself computes from `batch`, which must hold labels; moved to the model's device."""
    device = next(model.parameters()).device
    loss: Tensor = model(**{name: value.to(device) for name, value in batch.items()}).loss
    return loss


def _weights(group: list[Any]) -> list[float]:
    """How much each batch of an optimizer step counts: by its labels, as in the Trainer; without them, the same."""
    if len(group) == 1 or not all(isinstance(batch, dict) and "labels" in batch for batch in group):
        return [1 / len(group)] * len(group)
    counts = [int((batch["labels"][..., 1:] != -100).sum()) for batch in group]
    check(sum(counts) > 0, "batches", "have labels other than -100", "none in one optimizer step")
    return [count / sum(counts) for count in counts]


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007 - counted to see whether there was any
            yield batch
        check(count > 0, "batches", "not be empty, and give their batches again at every pass", f"{count} batches")


def train(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    pruner: TrainingPruner | None = None,
    *,
    steps: int,
    scheduler: Any = None,
    accumulate: int = 1,
    max_norm: float | None = 1.0,
    loss_fn: Loss = model_loss,
    progress: Progress = quiet,
    on_step: Callable[[int, float], bool | None] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 0,
    resume: str | Path | None = None,
) -> list[float]:
    """Train, and prune on the way if there is a `pruner`; call its `finish` afterwards.

    Args:
        model: to be trained in place, in training mode. In a DistributedDataParallel every process gives batches of its
            own, with as many labels; losses are means over the processes, and the first one writes.
        batches: passed over again and again, in an order that must not change between a run and its continuation (a
            loader that shuffles needs a generator of its own, seeded anew at every pass).
        optimizer: over the model's parameters.
        pruner: made for this model.
        steps: optimizer steps in all, those before a resume included.
        scheduler: of the learning rate; stepped after every optimizer step.
        accumulate: batches to an optimizer step; each counts by its labels that are not -100, so that the result is
            the mean over all of them; where batches have no `labels`, each counts the same.
        max_norm: gradients are clipped to this norm; None or 0: they are not.
        loss_fn: `(model, batch) -> loss`.
        progress: called as `(stage, done, total)`.
        on_step: called as `(steps done, loss)`; a true answer ends the training.
        checkpoint: folder for everything that a resume needs; replaced as a whole each time.
        every: steps between checkpoints; 0 for one at the end only.
        resume: such a folder to go on from, with new objects made as for the first run; bit for bit as if it had
            never stopped, where the kernels are deterministic.

    Returns:
        The loss of every step, those before a resume included.

    Raises:
        InputError: a value breaks its rule, the loss is not finite, no batches, or a checkpoint that does not belong
            here.
        CheckpointError: a damaged checkpoint.
    """
    check_whole(steps, "steps", 1)
    check_whole(accumulate, "accumulate", 1)
    check_whole(every, "every", 0)
    wanted = pruner.config.steps if pruner else steps
    check(steps >= wanted, "steps", f"be at least those of the pruner's schedule ({wanted})", steps)
    rule = "be left out where weights are cut over processes (FSDP2): keep them by torch.distributed.checkpoint"
    check(
        not is_sharded(model) or (checkpoint is None and resume is None), "checkpoint", rule, str(checkpoint or resume)
    )
    several = isinstance(model, DistributedDataParallel)
    inner: nn.Module = model.module if several else model  # type: ignore[assignment]
    ranks = Ranks.joined() if several else ALONE
    if checkpoint is not None and ranks.rank == 0:
        check_place(checkpoint)
    losses = load_training(resume, inner, optimizer, scheduler, pruner) if resume is not None else []
    source = _endless(batches)
    for _ in range(len(losses) * accumulate):
        next(source)
    if resume is not None:
        load_random_state(resume, ranks.rank)
    model.train()
    for t in range(len(losses), steps):
        if pruner:
            pruner.before_step(t)
        total = 0.0
        group = [next(source) for _ in range(accumulate)]
        for batch, weight in zip(group, _weights(group), strict=True):
            loss = loss_fn(model, batch) * weight
            loss.backward()
            total += loss.item()
        if ranks.several:
            mean = torch.tensor([total / ranks.size], dtype=torch.float64)
            ranks.add(mean)
            total = float(mean)
        if not abs(total) < float("inf"):
            raise InputError(f"loss must be finite; got {total} at step {t}")
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if pruner:
            pruner.step()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        model.zero_grad()
        losses.append(total)
        progress("training", t + 1, steps)
        stop = bool(on_step(t + 1, total)) if on_step else False
        last = stop or t + 1 == steps
        if checkpoint is not None and (last or (every and (t + 1) % every == 0)):
            save_training(checkpoint, inner, optimizer, scheduler, pruner, losses, ranks)
        if stop:
            break
    return losses
