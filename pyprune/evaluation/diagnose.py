"""What was lost by pruning, and where: every analysis of a dense and a pruned model in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import machine
from ..base.errors import check, check_choice, is_count
from ..base.memory import PeakMemory
from ..base.progress import Progress, quiet
from ..base.windows import start_ids
from ..model.decode import check_prompts
from .analysis import generation_drift, representation_hierarchy
from .tasks import run_tasks
from .tasks.suite import read_tasks

PARTS = ("hierarchy", "drift", "tasks")


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        prompts, prompt_tokens: continuations, and tokens each starts with.
        new_tokens: of a continuation at most.
        temperature: of the sampled continuations; greedy ones are always made.
        items: of each task at most; None for all.
        shots: solved examples in front of each question that is answered by a letter or a word.
    """

    prompts: int = 24
    prompt_tokens: int = 32
    new_tokens: int = 48
    temperature: float = 1.0
    items: int | None = 100
    shots: int = 2

    def __post_init__(self) -> None:
        check(is_count(self.shots), "shots", "be a non-negative integer", self.shots)
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            check(is_count(value) and value >= 1, name, "be a positive integer", value)
        check(
            self.temperature > 0, "temperature", "be above 0 (greedy continuations are made besides)", self.temperature
        )
        check(
            self.items is None or (is_count(self.items) and self.items >= 1), "items", "be positive or None", self.items
        )


@dataclass
class Diagnosis:
    """What was found; `facts` are JSON values: `hierarchy`, `drift` (`greedy`, `sampled`), `tasks`, each if asked for,
    `perplexity`, `seconds` (by part) and `peak_bytes`, by how much the process grew on top of the two models.
    """

    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.facts


def prompts_of(windows: Tensor, count: int, tokens: int, start: Sequence[int] = ()) -> list[Tensor]:
    """`count` stretches of `tokens` tokens, spread evenly over a text.

    Args:
        windows: `[N, W]` token ids; read as one row.
        count: how many.
        tokens: in each.
        start: tokens with which every text begins; where the windows begin with them, so does every stretch, which is
            longer by that.

    Raises:
        InputError: too little text for stretches that do not overlap.
    """
    head = torch.tensor(list(start), dtype=windows.dtype)
    head = head if bool((windows[:, : len(head)] == head).all()) else head[:0]
    stream = windows[:, len(head) :].flatten()
    rule = f"hold at least {count * tokens} tokens, for {count} prompts of {tokens}"
    check(len(stream) >= count * tokens, "text", rule, len(stream))
    step = len(stream) // count
    return [torch.cat([head, stream[i * step : i * step + tokens]]) for i in range(count)]


def check_parts(parts: Sequence[str]) -> None:
    """Raise `InputError` unless these are some of `PARTS`."""
    check(len(parts) > 0, "parts", f"be some of {', '.join(PARTS)}", list(parts))
    for part in parts:
        check_choice(part, "parts", PARTS)


def diagnose(
    dense: Any,
    pruned: Any,
    tokenizer: Any,
    windows: Tensor,
    budget: Budget | None = None,
    prompts: Sequence[Tensor] | None = None,
    tasks: Sequence[str | Path] | None = None,
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    progress: Progress = quiet,
) -> Diagnosis:
    """Run every analysis.

    Args:
        dense, pruned: causal LMs of Transformers, in eval mode, of one tokenizer; neither accelerated.
        tokenizer: theirs.
        windows: `[N, W]` token ids of text that the pruned model was not calibrated on.
        budget: how much of everything.
        prompts: token ids `[P]` to continue; by default stretches of the text.
        tasks: task files (see `tasks.records`); by default those of `records.ASKED`.
        parts: of `PARTS`.
        seed: of everything drawn.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: see `representation_hierarchy`, `generation_drift` and `run_tasks`; or no part.
    """
    check_parts(parts)
    chosen = budget or Budget()
    if "tasks" in parts:  # complains before anything is measured
        read_tasks(tasks, chosen.items, chosen.shots, seed)
    starts: list[Tensor] = []
    if "drift" in parts:
        starts = (
            list(prompts)
            if prompts is not None
            else prompts_of(windows, chosen.prompts, chosen.prompt_tokens, start_ids(tokenizer))
        )
        for model in (dense, pruned):
            check_prompts(model, starts, chosen.new_tokens)

    def hierarchy() -> Any:
        return representation_hierarchy(dense, pruned, windows, progress=progress).to_json()

    def drift() -> Any:
        kinds = {"greedy": 0.0, "sampled": chosen.temperature}
        found = {
            name: generation_drift(dense, pruned, starts, chosen.new_tokens, temperature, seed, progress=progress)
            for name, temperature in kinds.items()
        }
        return {name: _readable(drift.to_json(), tokenizer) for name, drift in found.items()}

    def by_task() -> Any:
        return run_tasks(dense, pruned, tokenizer, tasks, chosen.items, progress, chosen.shots, seed).to_json()

    steps: dict[str, Callable[[], Any]] = {"hierarchy": hierarchy, "drift": drift, "tasks": by_task}
    facts: dict[str, Any] = {"budget": vars(chosen), "seed": seed}
    seconds: dict[str, float] = {}
    with PeakMemory() as memory:
        for part in (name for name in PARTS if name in parts):
            started = time.perf_counter()
            facts[part] = steps[part]()
            seconds[part] = time.perf_counter() - started
    return Diagnosis({**facts, "seconds": seconds, "peak_bytes": memory.growth})


def _readable(drift: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The examples as text."""
    examples = [{name: tokenizer.decode(ids) for name, ids in example.items()} for example in drift["examples"]]
    return {**drift, "examples": examples}


def described(
    found: Diagnosis,
    dense: Any,
    pruned: Any,
    names: Mapping[str, str],
    text: str,
    windows: Tensor,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A diagnosis with what it is of, as JSON values.

    Args:
        found: what `diagnose` gave.
        dense, pruned: the models.
        names: of `dense` and `pruned`, for people; no paths.
        text: the text's name.
        windows: `[N, W]` token ids of it.
        dtype: of the weights.
    """
    models = {"dense": dense, "pruned": pruned}
    return {
        **names,
        "text": text,
        "tokens": windows.numel(),
        "window": windows.shape[1],
        "dtype": dtype,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "provenance": (getattr(pruned.config, "pyprune", None) or {}).get("provenance"),
        **found.to_json(),
        "machine": machine.facts(),
    }
