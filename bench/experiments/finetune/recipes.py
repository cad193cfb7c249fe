"""Sizes and lengths of everything, in one table: what is compared is trained for equal steps on equal batches."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from pyprune.base.errors import InputError

METHODS = ("random", "magnitude", "movement", "gum", "l0")
KEEPS = (0.1, 0.3, 0.5)
SEEDS = (0, 1, 2)

_OF_A_RUN = (
    "steps",
    "batch",
    "rate",
    "score_rate",
    "score_optimizer",
    "gate_rate",
    "multiplier_rate",
    "warmup",
    "cooldown",
    "windows",
    "window",
    "decode",
)


@dataclass(frozen=True)
class Recipe:
    """How one model learns one task.

    Attributes:
        layers, hidden_size, heads, width, vocabulary: of a GPT-2 made from scratch; 0 for a model that exists.
        dense_steps, dense_batch, dense_rate: the training of the dense model on the task, before any pruning.
        steps, batch, rate: of each pruning run, and of the dense model trained on for comparison.
        precision: of forward passes in training, dense and pruned: `float32`, or `bfloat16` by autocast; weights,
            optimizer and every evaluation are float32.
        score_rate, score_optimizer: of mask scores, as in the public code of the paper.
        gate_rate, multiplier_rate: of L0's gates, higher for a shorter schedule, and of its Lagrangian.
        warmup, cooldown: shares of the steps before pruning begins and after it ended.
        inputs: test inputs that are evaluated, spread evenly over the test set.
        targets: references of each that count for perplexity, at most.
        new_tokens: longest generated text.
        windows, window: tokens of test text that redundancy is measured on.
        decode: texts generated at a time.
    """

    dense_steps: int
    steps: int
    layers: int = 0
    hidden_size: int = 0
    heads: int = 0
    width: int = 0
    vocabulary: int = 0
    dense_batch: int = 32
    dense_rate: float = 2e-3
    batch: int = 32
    rate: float = 1e-3
    score_rate: float = 1e-2
    score_optimizer: str = "adam"
    gate_rate: float = 0.1
    multiplier_rate: float = 0.03
    warmup: float = 0.1
    cooldown: float = 0.3
    inputs: int = 200
    targets: int = 2
    new_tokens: int = 72
    windows: int = 32
    window: int = 128
    decode: int = 100
    precision: str = "float32"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def dense_json(self) -> dict[str, Any]:
        """What the dense model and its evaluation depend on."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_A_RUN}


_SMALL = {"layers": 4, "hidden_size": 128, "heads": 4, "width": 512, "vocabulary": 1024}
_LARGE = {"layers": 8, "hidden_size": 512, "heads": 8, "width": 2048, "vocabulary": 2048}
_WORDS = {"dense_batch": 128, "batch": 128, "inputs": 1000, "targets": 1, "new_tokens": 32, "decode": 250}
_SMOL = {"dense_rate": 1e-4, "rate": 1e-4, "dense_batch": 8, "batch": 8}
# What two CPU cores do in minutes: 4 texts a step, in bfloat16, which is twice as fast here. By batches of 8 the dense
# model gains little on E2E after 80 steps; half of these 160 come after the last neuron went.
_FULL = {"dense_steps": 100, "steps": 160, "warmup": 0.05, "cooldown": 0.5, "precision": "bfloat16", "gate_rate": 0.3}
_FEW = {"inputs": 40, "targets": 1, "decode": 40, "windows": 8}

# (task, model, size)
RECIPES = {
    ("e2e", "scratch", "cpu"): Recipe(dense_steps=1000, steps=250, **_SMALL),
    ("e2e", "scratch", "gpu"): Recipe(dense_steps=3000, steps=1500, inputs=630, dense_rate=5e-4, rate=3e-4, **_LARGE),
    ("g2p", "scratch", "cpu"): Recipe(dense_steps=2000, steps=400, **{**_SMALL, "vocabulary": 512}, **_WORDS),
    ("g2p", "scratch", "gpu"): Recipe(
        dense_steps=10000, steps=3000, **{**_LARGE, "vocabulary": 512}, **_WORDS | {"dense_rate": 5e-4, "rate": 3e-4}
    ),
    ("e2e", "smol", "cpu"): Recipe(**_SMOL | _FULL | _FEW | {"dense_batch": 4, "batch": 4}),
    ("e2e", "smol", "gpu"): Recipe(dense_steps=1000, steps=1000, inputs=630, decode=128, **_SMOL | {"batch": 32}),
    ("wikitext", "smol", "cpu"): Recipe(**_SMOL | _FULL | _FEW | {"dense_batch": 2, "batch": 2}),
    ("wikitext", "smol", "gpu"): Recipe(
        dense_steps=300, steps=1000, inputs=1000, targets=1, decode=64, **_SMOL | {"batch": 16, "dense_batch": 16}
    ),
    ("g2p", "smol", "cpu"): Recipe(
        dense_steps=100, steps=100, **_WORDS | _SMOL | {"inputs": 100, "decode": 100, "windows": 8}
    ),
    ("g2p", "smol", "gpu"): Recipe(dense_steps=3000, steps=3000, **_WORDS | _SMOL | {"dense_batch": 128, "batch": 128}),
}


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an older result has it, with what was no choice then: its default was in force."""
    return {**{f.name: f.default for f in fields(Recipe) if f.default is not MISSING}, **values}


def recipe(task: str, model: str, size: str) -> Recipe:
    """The row of the table.

    Raises:
        InputError: there is none.
    """
    if (found := RECIPES.get((task, model, size))) is None:
        known = ", ".join("/".join(key) for key in RECIPES)
        raise InputError(f"task, model and size must be one of {known}; got {task}/{model}/{size}")
    return found
