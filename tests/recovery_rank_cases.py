"""Recovery in several processes, and in one: run by `python -m torch.distributed.run`.

recovery_rank_cases.py OUT    every case; rank r writes OUT/NAME-r.safetensors and OUT/NAME-r.json
"""

from __future__ import annotations

import copy
import errno
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent)]
QUICK = {"steps": 12, "learning_rate": 1e-2, "held_out": 0.2, "every": 4, "precision": "float32"}
# Name -> what is other than in QUICK. Sixteen windows of two sources are gone over more than once.
CASES: dict[str, dict[str, Any]] = {
    "even": {"batch": 4},
    "odd": {"batch": 3, "train": "all", "prose": True},
    "adapters": {"batch": 2, "mode": "lora", "rank": 4},
    "timed": {"batch": 2, "minutes": 60.0},
}
WRONG = ("batch", "config", "teacher", "text", "folder", "full", "damaged", "loss")


def config(**changes: Any) -> Any:
    from pyprune.training.distillation import DistillationConfig
    from pyprune.training.recovery import RecoverConfig

    if changes.pop("prose", False):
        changes["distillation"] = DistillationConfig(2.0, 0.2, 0.8)
    return RecoverConfig(**{**QUICK, **changes})


def pair() -> tuple[Any, Any]:
    """A model without half of its neurons, and the dense one."""
    from conftest import make_model

    from pyprune import prune

    teacher = make_model("llama")
    student = copy.deepcopy(teacher)
    prune(student, 0.5, "random", allocation="uniform:multiple=8", repair=None, together=False)
    return student, teacher


def text() -> Any:
    """Sixteen windows of 16, every fourth of another source."""
    import torch

    from pyprune.pruning.mixture import Windows

    starts = torch.randint(3, 60, (16, 1), generator=torch.Generator().manual_seed(2))
    ids = 3 + (starts + 7 * torch.arange(16)) % 60
    sources = torch.tensor([0, 0, 0, 1] * 4)
    return Windows(torch.where(sources[:, None] == 1, ids.flip(1), ids), sources, ("rule", "backwards"))


def recovered(asked: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights afterwards, and the report."""
    import torch

    from pyprune.training.recovery import recover

    student, teacher = pair()
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    report = recover(student, teacher, text(), asked, **options)
    return {name: p.detach().clone() for name, p in student.named_parameters()}, report.to_json()


def failed(name: str, rank: int, out: Path) -> str:
    """What `recover` says where the ranks are given what does not do."""
    import torch

    from pyprune.training.recovery import STATE, recover

    student, teacher = pair()
    windows, asked, folder = text(), config(batch=2), None
    patch: Any = nullcontext()
    if name == "batch":
        asked = config(batch=1)
    elif name == "config":
        asked = config(batch=2, learning_rate=1e-3 * (1 + rank))
    elif name == "teacher" and rank:
        with torch.no_grad():
            teacher.lm_head.weight[0, 0] += 1
    elif name == "text" and rank:
        windows.ids[0, 0] += 1
    elif name == "folder":
        folder = out / "even-0.json" / "state"
    elif name == "full":
        folder = out / "full"

        def no_room(*given: Any) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        patch = mock.patch("pyprune.training.persist.write", no_room) if rank == 0 else patch
    elif name == "damaged":
        folder = out / "damaged"
        if rank == 0:
            folder.mkdir()
            (folder / STATE).write_bytes(b"x")
    elif name == "loss" and rank:  # no parameter: the other rank cannot know of it
        teacher.lm_head.register_forward_hook(lambda module, given, logits: logits / 0)
        teacher.get_output_embeddings = lambda: None
    try:
        with patch:
            recover(student, teacher, windows, asked, folder=folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, out: Path) -> None:
    from safetensors.torch import save_file

    def keep(name: str, weights: dict[str, Any], report: dict[str, Any]) -> None:
        save_file(weights, out / f"{name}-{rank}.safetensors")
        (out / f"{name}-{rank}.json").write_text(json.dumps(report))

    for name, changes in CASES.items():
        keep(name, *recovered(config(**changes)))

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 8:
            raise OSError("stopped")

    asked, folder = config(batch=4, save_every=5), out / f"state-{rank}"  # the second rank's has nothing in it
    try:
        recovered(asked, folder=folder, progress=stop)
    except OSError:
        keep("resumed", *recovered(asked, folder=folder))
    for name in WRONG:
        (out / f"{name}-{rank}.txt").write_text(failed(name, rank, out))


if __name__ == "__main__":
    from rank_cases import group

    with group() as number:
        main(number, Path(sys.argv[1]))
