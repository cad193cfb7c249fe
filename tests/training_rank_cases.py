"""Training one model in several processes, and in one: run by `python -m torch.distributed.run`.

training_rank_cases.py OUT    every case; rank r writes OUT/NAME-r.safetensors
"""

from __future__ import annotations

import json
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


def by_fsdp(rank: int, folder: Path, start: int, method: str = "movement") -> dict[str, Any]:
    """The same with weights that are cut over the ranks; after four steps into `folder`, or on from there."""
    import test_training_loop as loop
    import torch
    import torch.distributed.checkpoint as dcp
    from conftest import make_model
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    from pyprune.training import TrainingPruner

    own = [row for i, row in enumerate(rows()) if i % 4 // 2 == rank]
    model = make_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer, scheduler = loop.optimizer_of(model)
    pruner = TrainingPruner(model, loop.config_of(method))
    if start:
        weights, moments = get_state_dict(model, optimizer)
        kept = {"model": weights, "optimizer": moments}
        dcp.load(kept, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
        pruner.load(folder)
        scheduler.last_epoch = start - 1
        scheduler.step()
    batches = loop.batches_of(own, 2)
    model.train()
    for step in range(start, loop.STEPS):
        pruner.before_step(step)
        train_loss = model(**batches[step % len(batches)]).loss
        train_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pruner.step()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 3 and method == "movement":
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            pruner.save(folder)
    into = make_model("llama", seed=5) if rank == 0 else None
    mask = pruner.finish(into=into)
    return {} if into is None else state_of(into, mask)


def refused(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> list[str]:
    """What is said of weights that are cut, where that does not do."""
    import test_training_loop as loop
    import torch
    from conftest import make_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers import TrainerState

    from pyprune.training import PruningCallback, TrainingPruner, train

    model = fully_shard(make_model("llama"))
    pruner = TrainingPruner(model, loop.config_of("movement"))
    optimizer, _ = loop.optimizer_of(model)
    found = [refused(lambda: pruner.finish(into=None))]
    found.append(refused(lambda: train(model, [], optimizer, pruner, steps=loop.STEPS, checkpoint="x")))
    pruner.remove()
    train_begin = PruningCallback(loop.config_of("movement")).on_train_begin
    arguments, state = loop.arguments("x"), TrainerState(max_steps=8)
    found.append(refused(lambda: train_begin(arguments, state, None, model)))
    found.append(refused(lambda: TrainingPruner(model, loop.config_of("smoothed"))))
    flat = FullyShardedDataParallel(make_model("llama"), device_id=torch.device("cpu"))
    found.append(refused(lambda: train_begin(arguments, state, None, flat)))
    parallel = make_model("llama")
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(parallel.lm_head, mesh, ColwiseParallel())
    found.append(refused(lambda: train_begin(arguments, state, None, parallel)))
    other = loop.config_of("movement", keep=0.4 + torch.distributed.get_rank() / 10)
    return [*found, refused(lambda: TrainingPruner(make_model("llama"), other))]


def by_cut_trainer(rank: int, folder: Path, resume: bool = False) -> dict[str, Any]:
    """The Trainer with the callback under FSDP2: after four steps a checkpoint, or on from there.

    Accelerate cuts models on accelerators only. Where it has a GPU it sets what is set here; all else is its own.
    """
    import test_training_loop as loop
    import torch
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from conftest import make_model
    from transformers import Trainer

    from pyprune.training import PruningCallback

    class Cut(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    wraps = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    several = {"fsdp": True, "fsdp_config": wraps} if rank >= 0 else {}
    size = 2 if several else 4
    into = make_model("llama", seed=5) if rank == 0 else None
    callback = PruningCallback(loop.config_of("movement"), into=into)
    arguments = loop.arguments(folder, per_device_train_batch_size=size, save_strategy="steps", save_steps=4, **several)
    model = make_model("llama")
    trainer = (Cut if several else Trainer)(
        model, arguments, train_dataset=rows(), callbacks=[callback],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 2e-3, "eps": 1e-4}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    if several:
        assert isinstance(trainer.model, torch.distributed.fsdp.FSDPModule)
        assert all(hasattr(p, "placements") for p in trainer.model.parameters())
    kept = {f"keep.{i}": k.neurons for i, k in enumerate(callback.mask.layers)}
    return state_of(into or model, callback.mask) if rank <= 0 else kept


def main(rank: int, out: Path) -> None:
    import torch.distributed as dist
    from safetensors.torch import save_file

    ranks = dist.get_world_size()
    for name, method in METHODS.items():
        save_file(trained(method, rank, ranks), out / f"{name}-{rank}.safetensors")
    stop = {"checkpoint": out / "state", "on_step": lambda done, loss: done == 4}
    trained("movement", rank, ranks, **stop)
    found = trained("movement", rank, ranks, resume=out / "state")
    save_file(found, out / f"resumed-{rank}.safetensors")
    if rank == 0:
        (out / "cut").mkdir()
    dist.barrier()
    for name, start in (("whole", 0), ("cut", 4)):
        save_file(by_fsdp(rank, out / "cut", start), out / f"fsdp-{name}-{rank}.safetensors")
    for method in ("platon", "magnitude"):
        save_file(by_fsdp(rank, out / "cut", 0, method), out / f"fsdp-{method}-{rank}.safetensors")
    (out / f"refused-{rank}.json").write_text(json.dumps(refusals()))
    save_file(by_trainer(out / "trainer", 2), out / f"trainer-{rank}.safetensors")
    for name in ("whole", "cut"):
        found = by_cut_trainer(rank, out / "fsdp-trainer", name == "cut")
        save_file(found, out / f"fsdp-trainer-{name}-{rank}.safetensors")


if __name__ == "__main__":
    from rank_cases import group

    with group(sharded=True) as number:
        main(number, Path(sys.argv[1]))
