"""Generation: the model writes a few tokens, and its first line is held against the answers.

The metrics are those of the field's question answering (Rajpurkar et al. 2016, SQuAD), of texts without case,
punctuation and articles: `exact` match; `contains`, whether an answer's words stand in the line in a row; `f1` of the
words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ...base.errors import check
from ...base.progress import Progress, quiet
from ...model.decode import end_tokens, plain
from .encoding import Row, check_rows, prompt_ids
from .records import GenerationRecord, full_prompt

METRICS = ("exact", "contains", "f1")
NEW_TOKENS = 8
_ROWS_AT_ONCE = 16
_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and articles; an article that is the whole text counts."""
    kept = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold())
    every = kept.split()
    return [word for word in every if word not in _ARTICLES] or every


def first_line(text: str) -> str:
    """The first line with something on it; a model may begin with a line break."""
    return next((line for line in re.split(r"[\r\n]", text) if line.strip()), "").strip()


def _f1(found: list[str], wanted: list[str]) -> float:
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def judge(text: str, answers: Sequence[str]) -> tuple[float, float, float]:
    """`exact`, `contains` and `f1`, 0 to 1 each, of a text against the best of the answers."""
    found = words(text)
    wanted = [words(answer) for answer in answers]
    spans = [any(found[i : i + len(w)] == w for i in range(len(found) - len(w) + 1)) for w in wanted if w]
    return float(found in wanted), float(any(spans)), max(_f1(found, w) for w in wanted)


def _written_lines(tokenizer: Any, start: int, ids: Tensor, scores: Any, **_: Any) -> Tensor:
    """`[B]` bool: which rows have a first line that a line break ends, so that no more of them is needed."""
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, start:].tolist()]
    return torch.tensor([bool(re.search(r"\S.*[\r\n]", text)) for text in texts], device=ids.device)


@torch.no_grad()
def written(
    model: Any,
    tokenizer: Any,
    records: Sequence[GenerationRecord],
    new_tokens: int = NEW_TOKENS,
    progress: Progress = quiet,
) -> list[str]:
    """What the model writes after each prompt, greedily, until a line is full or there are enough tokens.

    Prompts of one length in tokens are run together, so nothing is padded and a batch gives what single prompts give.

    Args:
        model: a causal LM of Transformers, in eval mode.
        tokenizer: its tokenizer.
        records: the prompts.
        new_tokens: tokens to add at most.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no record, less than one new token, or a prompt that with them is longer than the model's context.
    """
    check(bool(records), "records", "be at least one", len(records))
    check(new_tokens >= 1, "new_tokens", "be at least 1", new_tokens)
    rows = [prompt_ids(tokenizer, full_prompt(record)) for record in records]
    check_rows(model, rows, "records", new_tokens)
    device = next(model.parameters()).device
    ends = end_tokens(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    texts = [""] * len(rows)
    done = 0
    for numbers in _groups(rows):
        progress("generation", done, len(rows))
        ids = torch.tensor([rows[i] for i in numbers], device=device)
        stops = [partial(_written_lines, tokenizer, ids.shape[1])]
        out = plain(model).generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=how, stopping_criteria=stops
        )
        for i, row in zip(numbers, out[:, ids.shape[1] :].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
        done += len(numbers)
    progress("generation", len(rows), len(rows))
    return texts


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of rows of one length, few enough to run at once."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    same = [numbers for _, numbers in sorted(lengths.items())]
    return [numbers[i : i + _ROWS_AT_ONCE] for numbers in same for i in range(0, len(numbers), _ROWS_AT_ONCE)]


def generation_scores(
    model: Any,
    tokenizer: Any,
    records: Sequence[GenerationRecord],
    new_tokens: int = NEW_TOKENS,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """For each of `METRICS`, `[N]` float64, 0 to 1, of the first line that the model writes.

    Raises:
        InputError: see `written`.
    """
    texts = written(model, tokenizer, records, new_tokens, progress)
    scores = [judge(first_line(text), record.answers) for text, record in zip(texts, records, strict=True)]
    table = torch.tensor(scores, dtype=torch.float64)
    return {name: table[:, i] for i, name in enumerate(METRICS)}
