"""Training one model in several processes, and in one: run by `python -m torch.distributed.run`.

training_rank_cases.py OUT    every case; rank r writes OUT/NAME-r.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]
METHODS = {
    "movement": "movement",
    "gum": "gum",
    "statistics": "smoothed:criterion=taylor-element2",
    "moments": "smoothed:criterion=obs",
}


def rows() -> list[dict[str, Any]]:
    """Sixteen sequences of 12 tokens, with labels."""
    import torch

    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def state_of(model: Any, mask: Any) -> dict[str, Any]:
    """Its weights, and the neurons that stayed."""
    keeps = {f"keep.{i}": k.neurons for i, k in enumerate(mask.layers)}
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **keeps}


def trained(method: str, rank: int = 0, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """A tiny model after the plain loop, each rank on its share of every batch of four; cut."""
    import test_training_loop as loop
    import torch
    from conftest import make_model

    from pyprune.training import TrainingPruner, train

    size = 4 // ranks
    own = [row for i, row in enumerate(rows()) if i % 4 // size == rank]
    model = make_model("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    pruner = TrainingPruner(model, loop.config_of(method))
    optimizer, scheduler = loop.optimizer_of(model)
    batches = loop.batches_of(own, size)
    losses = train(wrapped, batches, optimizer, pruner, steps=loop.STEPS, scheduler=scheduler, **options)
    stopped = pruner.done < loop.STEPS
    found = {} if stopped else state_of(model, pruner.finish())
    return {**found, "losses": torch.tensor(losses)}


def by_trainer(folder: Path, size: int) -> dict[str, Any]:
    """The same by the Trainer with the callback."""
    import test_training_loop as loop
    from conftest import make_model

    model = make_model("llama")
    callback = loop.by_trainer(
        model, rows(), loop.config_of("movement"), folder, per_device_train_batch_size=size, save_strategy="steps",
        save_steps=4,
    )  # fmt: skip
    return state_of(model, callback.mask)


def main(out: Path) -> None:
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, method in METHODS.items():
        save_file(trained(method, rank, ranks), out / f"{name}-{rank}.safetensors")
    stop = {"checkpoint": out / "state", "on_step": lambda done, loss: done == 4}
    trained("movement", rank, ranks, **stop)
    found = trained("movement", rank, ranks, resume=out / "state")
    save_file(found, out / f"resumed-{rank}.safetensors")
    save_file(by_trainer(out / "trainer", 2), out / f"trainer-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
