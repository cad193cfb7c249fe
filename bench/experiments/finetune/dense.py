"""The dense model: trained on the task once, kept in a folder, the start or the teacher of every pruning run."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.base.files import new_folder
from pyprune.model.loading import load_model, load_tokenizer

from . import batches, models
from .evaluate import evaluate
from .recipes import Recipe
from .tasks import Task

_SEED = 1234
_WARMUP = 50
_LOGGED = 50
_FACTS = "dense.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Dense:
    """A dense model on disk.

    Attributes:
        folder: with model, tokenizer and facts.
        facts: how it was trained, and its evaluation.
        pretrained: pruning starts from the model before it saw the task, as in the paper; this one is the teacher.
    """

    folder: Path
    facts: dict[str, Any]
    pretrained: bool

    def teacher(self) -> tuple[Any, Any]:
        """The model that learned the task, and its tokenizer."""
        return load_model(str(self.folder)), load_tokenizer(str(self.folder))

    def start(self) -> tuple[Any, Any]:
        """What a pruning run starts from."""
        return models.smol() if self.pretrained else self.teacher()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = min(_WARMUP, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def forward(model: Any, precision: str) -> torch.autocast:
    """A context for forward passes in training: `float32`, or `bfloat16` by autocast."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def adamw(model: Any, rate: float) -> torch.optim.AdamW:
    """The optimizer of every training here."""
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)


def fit(
    model: Any, data: Iterable[dict[str, Tensor]], steps: int, peak: float, say: Say, precision: str = "float32"
) -> list[float]:
    """AdamW over `data`; the mean loss of every 50 steps."""
    model.train()
    optimizer = adamw(model, peak)
    curve, recent = [], []
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with forward(model, precision):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if len(recent) == _LOGGED or step + 1 == steps:
            curve.append(sum(recent) / len(recent))
            say(f"step {step + 1} of {steps}, loss {curve[-1]:.3f}")
            recent = []
    model.eval()
    return curve


def prepare(task: Task, model: str, recipe: Recipe, folder: Path, device: str = "cpu", say: Say = print) -> Dense:
    """The dense model of a recipe, trained now or found in `folder`.

    Args:
        task: the task.
        model: one of `models.MODELS`.
        recipe: sizes and lengths.
        folder: where such models are kept; each recipe has its own place in it.
        device: where to train.
        say: told about progress.
    """
    pretrained = model == "smol"
    wanted = {"task": task.note, "model": model, "recipe": recipe.dense_json(), "seed": _SEED}
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / f"{task.name}-{model}-{name}"
    if (place / _FACTS).is_file():
        return Dense(place, json.loads((place / _FACTS).read_text(encoding="utf-8")), pretrained)
    started = time.perf_counter()
    if pretrained:
        network, tokenizer = models.smol()
    else:
        tokenizer = models.train_tokenizer([text for pair in task.pairs for text in pair], recipe.vocabulary)
        network = models.scratch(recipe, tokenizer, _SEED)
    network.to(device)
    torch.manual_seed(_SEED)
    rows = batches.encode(tokenizer, task.pairs, task.ends)
    data = batches.batches(rows, recipe.dense_batch, recipe.dense_steps, _SEED, tokenizer.pad_token_id, device)
    curve = fit(network, data, recipe.dense_steps, recipe.dense_rate, say, recipe.precision)
    facts = {
        **wanted,
        "parameters": sum(p.numel() for p in network.parameters()),
        "pairs": len(rows),
        "train_seconds": time.perf_counter() - started,
        "loss": curve,
        **evaluate(network, tokenizer, task, recipe),
    }
    with new_folder(place, overwrite=True, strangers=lambda folder: []) as temporary:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Dense(place, facts, pretrained)
