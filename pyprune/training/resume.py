"""Everything that the plain loop needs to go on from: weights, optimizer, scheduler, pruner, losses, random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError, check
from ..base.files import check_out_folder, new_folder
from ..base.ranks import ALONE, Ranks
from . import persist
from .pruner import FILE, TrainingPruner

_WEIGHTS, _OPTIMIZER, _RUN = "weights.safetensors", "optimizer.safetensors", "run.safetensors"
_FORMAT = "pyprune-loop-1"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            where: dict[str, Any] = tensors if isinstance(value, Tensor) else plain
            where[f"{index}.{name}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    current = optimizer.state_dict()["param_groups"]
    groups = facts["groups"]
    sizes = [len(g["params"]) for g in groups]
    own = [len(g["params"]) for g in current]
    check(sizes == own, "optimizer of the checkpoint", f"have groups of {own} parameters", sizes)
    for group, mine in zip(groups, current, strict=True):  # JSON knows no tuples
        group.update({k: tuple(v) for k, v in group.items() if isinstance(mine.get(k), tuple)})
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *facts["plain"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _strangers(folder: Path) -> list[str]:
    ours = {_WEIGHTS, _OPTIMIZER, _RUN, FILE}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)


def check_place(folder: str | Path) -> None:
    """Raise `InputError` unless `save_training` may write `folder`: it holds an older state, or nothing."""
    check_out_folder(folder, True, _strangers)


def save_training(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    pruner: TrainingPruner | None,
    losses: list[float],
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint folder, replacing an older one as a whole; of `ranks` that train together the first does.

    Raises:
        InputError: the optimizer or the scheduler has state that is neither tensors nor JSON, or as `check_place`.
    """
    own = _of_rank(ranks.rank)
    random = {f"{own}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random.update({f"{own}cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    with ranks.working():
        random = ranks.exchange(random)
        if ranks.rank == 0:
            _write(folder, model, optimizer, scheduler, pruner, losses, random)
    return Path(folder)


def _of_rank(rank: int) -> str:
    """What names of random states of a rank begin with."""
    return f"rank{rank}." if rank else ""


def _write(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    pruner: TrainingPruner | None,
    losses: list[float],
    random: dict[str, Tensor],
) -> None:
    run = {"losses": losses, "scheduler": scheduler.state_dict() if scheduler is not None else None}
    with new_folder(folder, True, _strangers) as new:
        persist.write(new / _WEIGHTS, _FORMAT, _weights(model), {})
        persist.write(new / _OPTIMIZER, _FORMAT, *_optimizer_state(optimizer))
        persist.write(new / _RUN, _FORMAT, random, run)
        if pruner is not None:
            pruner.save(new)


@torch.no_grad()
def load_training(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    pruner: TrainingPruner | None = None,
) -> list[float]:
    """Put everything but the random state back in its place; returns the losses of the steps taken.

    Raises:
        InputError: no such checkpoint, or one of another model, optimizer, or pruning configuration.
        CheckpointError: a damaged checkpoint.
    """
    folder = Path(folder)
    check(folder.is_dir(), "resume", "be an existing folder", str(folder))
    weights, _ = persist.read(folder / _WEIGHTS, _FORMAT)
    state, facts = persist.read(folder / _OPTIMIZER, _FORMAT)
    _, run = persist.read(folder / _RUN, _FORMAT)
    own = _weights(model)
    for name in sorted(own.keys() | weights.keys()):
        mine, theirs = (t[name].shape if name in t else None for t in (own, weights))
        check(mine == theirs, f"{name} of the checkpoint", f"have shape {tuple(mine) if mine else None}", theirs)
    try:
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        _load_optimizer(optimizer, state, facts)
        if scheduler is not None:
            scheduler.load_state_dict(run["scheduler"])
        losses = [float(loss) for loss in run["losses"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged, or has no such part: {type(error).__name__}: {error}") from error
    if pruner is not None:
        pruner.load(folder)
    return losses


def load_random_state(folder: str | Path, rank: int = 0) -> None:
    """Put torch's random state of a rank back, on the CPU and on every CUDA device there is.

    Raises:
        InputError: the checkpoint is of fewer processes.
    """
    states, _ = persist.read(Path(folder) / _RUN, _FORMAT)
    own = _of_rank(rank)
    check(f"{own}cpu" in states, "resume", f"be of as many processes as go on; this is rank {rank}", str(folder))
    torch.set_rng_state(states[f"{own}cpu"])
    for i in range(torch.cuda.device_count()):
        if f"{own}cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"{own}cuda.{i}"], i)
