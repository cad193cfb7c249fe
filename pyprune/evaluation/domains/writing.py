"""What a model writes: greedy answers to the same prompts, how they repeat themselves, how likely dense finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check, is_count
from ...base.progress import Progress, quiet
from ...model.decode import decode
from ..agreement import perplexity_of
from ..generation import chat_prompt
from ..likeness import distinct, repetition
from ..tasks.encoding import prompt_ids
from .texts import json_lines

_PROMPTS = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One of the prompts that ship: what it asks for in a word, and its text."""

    kind: str
    text: str


@dataclass(frozen=True)
class Writing:
    """What one model wrote.

    Attributes:
        new_tokens: of a text at most.
        chat: whether the prompts went through the chat template.
        texts: one for each of `prompts()`.
        repetition: of each, the share of 4-grams that stood in it before.
        distinct2: different bigrams over bigrams of all texts together.
        perplexity: of the texts under the dense model, or under the model itself where no dense one was at hand; None
            where it was not measured.
    """

    new_tokens: int
    chat: bool
    texts: tuple[str, ...]
    repetition: tuple[float, ...]
    distinct2: float
    perplexity: float | None


def prompts() -> tuple[Prompt, ...]:
    """The 32 prompts that ship."""
    entries = json_lines(_PROMPTS.read_text(encoding="utf-8"), _PROMPTS.name, ("kind", "prompt"))
    return tuple(Prompt(entry["kind"], entry["prompt"]) for entry in entries)


def has_chat(tokenizer: Any) -> bool:
    """Whether prompts go through a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _starts(tokenizer: Any, chat: bool) -> list[Tensor]:
    texts = [prompt.text for prompt in prompts()]
    if chat:  # a template writes its own start token
        made = [chat_prompt(tokenizer, text) for text in texts]
        rows: Sequence[Sequence[int]] = [
            tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in made
        ]
    else:
        rows = [prompt_ids(tokenizer, text) for text in texts]
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def write(
    model: Any, tokenizer: Any, new_tokens: int = 128, dense: Any | None = None, progress: Progress = quiet
) -> Writing:
    """Let a model answer the prompts that ship, greedily, through its chat template where the tokenizer has one.

    Args:
        model: a causal LM of Transformers, in eval mode.
        tokenizer: its tokenizer.
        new_tokens: of a text at most.
        dense: judges how likely the texts are; None leaves that out.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: less than one new token, or more than the model's context has room for.
    """
    check(is_count(new_tokens) and new_tokens >= 1, "new_tokens", "be a positive integer", new_tokens)
    chat = has_chat(tokenizer)
    starts = _starts(tokenizer, chat)
    found = decode(model, starts, new_tokens, progress=progress, padded=True)
    rows = [row.tolist() for row in found]
    return Writing(
        new_tokens,
        chat,
        tuple(tokenizer.decode(row, skip_special_tokens=True) for row in rows),
        tuple(map(repetition, rows)),
        distinct(rows, 2),
        None if dense is None else perplexity_of(dense, starts, found),
    )
