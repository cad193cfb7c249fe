"""One run: the start of a setting, pruned while it is fine-tuned, then compacted, evaluated and looked into."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pyprune.base import machine
from pyprune.model import families

from . import batches
from .answers import label, main_metric
from .dense import Dense, prepare
from .evaluate import evaluate, windows
from .pruning import fine_tune
from .recipes import Recipe, recipe
from .redundancy import redundancy
from .settings import Setting
from .tasks import TASKS, Task

# A run's curve is the mean loss of so many parts of it.
_CURVE = 20


def load_task(setting: Setting, data: Path | None) -> Task:
    """The task in the form that the model can learn: SmolLM2 copies values, a small model from scratch does not."""
    return TASKS[setting.task](data, setting.model == "smol")


def _thinned(losses: list[float]) -> list[float]:
    size = max(1, -(-len(losses) // _CURVE))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [round(sum(part) / len(part), 4) for part in parts]


@dataclass(frozen=True)
class Work:
    """Carries out settings; picklable, so that processes can.

    Attributes:
        data: the folder of the task's data, or None.
        folder: where dense models are kept.
        device: where to run.
        recipe: instead of the one in the table.
    """

    data: Path | None
    folder: Path
    device: str = "cpu"
    recipe: Recipe | None = None

    def recipe_of(self, setting: Setting) -> Recipe:
        return self.recipe or recipe(setting.task, setting.model, setting.size)

    def dense(self, setting: Setting, say: Any = print) -> Dense:
        """The dense model of a setting's task, trained if it is not there yet."""
        task = load_task(setting, self.data)
        return prepare(task, setting.model, self.recipe_of(setting), self.folder, self.device, say)

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """The entry of a run: its setting, every number, and a line of words."""
        task, made = load_task(setting, self.data), self.recipe_of(setting)
        dense = prepare(task, setting.model, made, self.folder, self.device, lambda _: None)
        started = time.perf_counter()
        model, tokenizer = dense.start()
        model.to(self.device)
        teacher = dense.teacher()[0].to(self.device) if setting.distilled else None
        rows = batches.encode(tokenizer, task.pairs, task.ends)
        data = batches.batches(rows, made.batch, made.steps, setting.seed, tokenizer.pad_token_id, self.device)
        torch.manual_seed(setting.seed)
        losses = fine_tune(model, data, setting, made, teacher)
        trained = time.perf_counter()
        found = evaluate(model, tokenizer, task, made)
        ids = windows(tokenizer, task.test, made.windows, made.window, task.ends)
        widths = [ffn.intermediate_size for ffn in families.find_ffns(model)]
        entry = {
            **setting.to_json(),
            "recipe": made.to_json(),
            **{name: found[name] for name in ("metrics", "inputs")},
            "redundancy": redundancy(model, ids),
            "widths": widths,
            "loss": _thinned(losses),
            "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
            "cpu": machine.facts()["cpu"],
            "commit": machine.source()["commit"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        shown = [(n, found["metrics"][n]["value"]) for n in dict.fromkeys((main_metric([entry]), "perplexity"))]
        return {**entry, "words": ", ".join(f"{label(name)} {number:.2f}" for name, number in shown)}
