"""What ranks do together, and one process by itself: run by `python -m torch.distributed.run`, as tests start it.

rank_cases.py OUT NAME ...    every case NAME, in one group; rank r writes OUT/NAME-r.json (and .safetensors)
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bench" / "checkout"), str(ROOT), str(Path(__file__).parent)]


def launched(arguments: list[str], processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """`arguments` (a script or `-m` module with its own) in so many processes of one thread."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run([*words, *arguments], capture_output=True, text=True, timeout=900, env=known, check=False)


@contextmanager
def group(sharded: bool = False) -> Iterator[int]:
    """Inside, this process is one of a group; gives its rank.

    The group's threads must end with it, as one that still lives when Python ends may abort the process. Torch's caches
    of `sharded` tensors keep the group: there the process is left before Python's end.
    """
    import torch
    import torch.distributed as dist

    import pyprune  # noqa: F401  # with torch._dynamo, which would hold a group that began before it

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield dist.get_rank()
    dist.destroy_process_group()
    if sharded:
        sys.stdout.flush()
        os._exit(0)
    gc.collect()
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ends meanwhile
            names.append((task / "comm").read_text().strip())
    assert not [name for name in names if "gloo" in name], names


def cases() -> dict[str, Any]:
    """Name -> a call that prunes; the ids are 8 windows of 16."""
    from conftest import make_model
    from moe_cases import make_mixture
    from tower_cases import make_tower

    def small(**options: Any) -> dict[str, Any]:
        return {"keep": 0.5, "allocation": "uniform:multiple=8", "text": text(), **options}

    bare = "least-squares:damping=0.01"
    return {
        "default": lambda: (make_model("llama"), small()),
        "damping": lambda: (make_model("gpt2"), small(repair="least-squares:damping=auto,target=0.5")),
        "refit": lambda: (make_model("opt"), small(method="wanda", repair="refit")),
        "gradients": lambda: (make_model("llama"), small(method="taylor-element", allocation="global:multiple=8")),
        "curves": lambda: (make_model("llama"), small(allocation="sensitivity:multiple=8", repair=bare)),
        "samples": lambda: (make_model("llama"), small(allocation="predictor:multiple=16,samples=8")),
        "apart": lambda: (make_model("llama"), small(sequential=False, repair=bare)),
        "experts": lambda: (make_mixture("mixtral"), small(keep=0.7, repair=bare)),
        "whole": lambda: (make_tower("t5"), small(method="wanda", repair=bare)),
        "blind": lambda: (make_model("llama"), {**small(method="magnitude-l2-both", repair=None), "text": None}),
    }


def text() -> Any:
    import torch

    return torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(2))


def pruned(model: Any, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a model afterwards, and what its report says."""
    from pyprune import prune

    report = prune(model, **options)
    facts = report.to_json()
    facts["neurons"] = [k.neurons.tolist() for k in report.mask.layers]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, facts


def wrong() -> dict[str, Any]:
    """Name -> a call that fails, given the rank."""
    from conftest import make_model

    options = {"keep": 0.5, "allocation": "uniform:multiple=8"}

    def broken(rank: int) -> tuple[Any, dict[str, Any]]:
        def progress(stage: str, done: int, total: int) -> None:
            if rank == 1 and stage == "pruning layers" and done == 1:
                raise OSError("no space left")

        return make_model("llama"), {**options, "text": text(), "progress": progress}

    return {
        "other": lambda rank: (make_model("llama", seed=rank), {**options, "keep": 0.5 + rank / 4, "text": text()}),
        "words": lambda rank: (make_model("llama"), {**options, "text": text() + rank}),
        "invalid": lambda rank: (make_model("llama"), {**options, "keep": 0.5 + rank, "text": text()}),
        "few": lambda rank: (make_model("llama"), {**options, "text": text()[:1].repeat(1, 4)}),
        "broken": broken,
        "places": lambda rank: text()[0, : 2 + rank].float(),
    }


def main(rank: int, out: Path, names: list[str]) -> None:
    import torch
    from safetensors.torch import save_file

    from pyprune.base.ranks import Ranks

    for name in names:
        if name in wrong():
            try:
                given = wrong()[name](rank)
                if isinstance(given, torch.Tensor):
                    Ranks.joined().add(given)
                else:
                    pruned(*given)
                facts: dict[str, Any] = {"error": None}
            except Exception as error:
                facts = {"error": str(error), "kind": type(error).__name__}
        else:
            weights, facts = pruned(*cases()[name]())
            save_file(weights, out / f"{name}-{rank}.safetensors")
        (out / f"{name}-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    with group() as number:
        main(number, Path(sys.argv[1]), sys.argv[2:])
