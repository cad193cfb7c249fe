"""The categorical subspace: what happens to the few tokens that are answers, beside what happens to all of them.

A choice is presented with letters, a question for yes or no with the words, and the model's next token is looked at:

    Question: The capital of France is          Question: Is Rome the capital of France? Answer yes or no.
    A. Rome                                     Answer:
    B. Paris
    Answer:

Restricted to the answer tokens and renormalised, the probabilities decide the item; their deviation between a dense
and a pruned model stands beside that of the full vocabulary at the same position (He et al. 2026, arXiv 2603.24652).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import InputError, check
from ...base.progress import Progress, quiet
from .encoding import Row, batches, check_rows, joined_ids, logits_at
from .records import ChoiceRecord
from .subspace import DEVIATIONS, ROWS_AT_ONCE, deviations, to_json

METRICS = ("accuracy", "mass")
MOST_CHOICES = len(string.ascii_uppercase)
_WORDS = ({"yes", "no"}, {"true", "false"})


class AnswerTokenError(InputError):
    """An answer that this tokenizer cannot say in one token: there is no subspace to look at."""


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens of one item, `(token, probability)` each, likeliest first."""

    prompt: str
    answer: str
    dense: tuple[tuple[str, float], ...]
    pruned: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Categorical:
    """Both models at the answer position of N items; every value `[N]` float64.

    Attributes:
        dense, pruned: each of `METRICS`: `accuracy`, 1 where the likeliest answer token is the right one; `mass`, the
            probability of all answer tokens together. `pruned` is empty where there is one model only.
        restricted: each of `DEVIATIONS` between the probabilities of the answer tokens, renormalised; empty likewise.
        full: the same of the whole vocabulary.
        top: the likeliest tokens of the first items.
    """

    dense: dict[str, Tensor]
    pruned: dict[str, Tensor]
    restricted: dict[str, Tensor]
    full: dict[str, Tensor]
    top: tuple[TopTokens, ...]

    def to_json(self, seed: int = 0) -> dict[str, Any]:
        """Means of the deviations with 95 % intervals over items, and the top tokens."""
        top = [
            {"prompt": t.prompt, "answer": t.answer, "dense": list(t.dense), "pruned": list(t.pruned)} for t in self.top
        ]
        return {"deviations": to_json(self.restricted, self.full, seed), "top": top}


def in_words(record: ChoiceRecord) -> bool:
    """Whether the options are the answers to a question: yes and no, or true and false."""
    return len(record.choices) == 2 and {choice.strip().lower() for choice in record.choices} in _WORDS


def presented(record: ChoiceRecord) -> tuple[str, tuple[str, ...]]:
    """What the model is shown, and the labels it answers with: the options themselves for yes or no, else letters.

    Raises:
        InputError: more options than letters.
    """
    start = f"{record.context}\n\n" if record.context else ""
    if in_words(record):
        asked = f"Answer {' or '.join(record.choices)}."
        return f"{start}Question: {record.prompt} {asked}\nAnswer:", record.choices
    count = len(record.choices)
    check(count <= MOST_CHOICES, "choices", f"be at most {MOST_CHOICES}, one a letter", count)
    letters = tuple(string.ascii_uppercase[:count])
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, record.choices, strict=True))
    return f"{start}Question: {record.prompt}\n{lines}Answer:", letters


def _examples(records: Sequence[ChoiceRecord], at: int, shots: int, order: Sequence[int]) -> str:
    """Solved records in front of the one at `at`: the first others in the order, with answers that take turns."""
    taken: list[int] = []
    for turn in range(shots):
        left = [i for i in order if i not in taken and i != at]
        wanted = turn % len(records[at].choices)
        taken.append(next((i for i in left if records[i].answer == wanted), left[0]))
    texts = []
    for i in taken:
        text, labels = presented(records[i])
        texts.append(f"{text} {labels[records[i].answer]}\n\n")
    return "".join(texts)


def answer_tokens(tokenizer: Any, text: str, labels: Sequence[str]) -> tuple[Row, Row]:
    """The prompt's token ids, and for each label the token that follows the prompt when it is the answer.

    Raises:
        AnswerTokenError: a label that is more than one token there.
        InputError: two labels that are the same token.
    """
    encoded = [joined_ids(tokenizer, text, label) for label in labels]
    for label, (_, answer) in zip(labels, encoded, strict=True):
        if len(answer) != 1:
            raise AnswerTokenError(
                f"answer {label!r} must be one token after the prompt; the tokenizer makes it {list(answer)}"
            )
    tokens = tuple(answer[0] for _, answer in encoded)
    check(len(set(tokens)) == len(tokens), "answers", "be different tokens", dict(zip(labels, tokens, strict=True)))
    return encoded[0][0], tokens


def _top(tokenizer: Any, logits: Tensor, count: int) -> tuple[tuple[str, float], ...]:
    values, ids = logits.double().softmax(0).topk(min(count, len(logits)))
    return tuple((tokenizer.decode([int(i)]), float(v)) for v, i in zip(values, ids, strict=True))


def categorical(
    dense: Any,
    pruned: Any | None,
    tokenizer: Any,
    records: Sequence[ChoiceRecord],
    progress: Progress = quiet,
    shots: int = 0,
    shown: int = 4,
    top: int = 5,
    seed: int = 0,
) -> Categorical:
    """Answer every record by the likeliest answer token, with two models side by side, and compare them.

    Logits of a few items are held at a time.

    Args:
        dense, pruned: causal LMs of Transformers, in eval mode, of one tokenizer and vocabulary; `pruned` may be None.
        tokenizer: theirs.
        records: of any numbers of options.
        progress: called as `(stage, done, total)`.
        shots: solved records in front of each, of the same records; they show a model that was not taught to answer by
            letter what an answer looks like.
        shown: of how many records to keep the likeliest tokens.
        top: how many tokens of each.
        seed: of the order in which records serve as shots.

    Raises:
        InputError: no record, no more of them than shots, one longer than a model's context, an answer that is not one
            token, logits of different vocabularies or that are not finite.
    """
    check(bool(records), "records", "be at least one", len(records))
    check(0 <= shots < len(records), "shots", f"be from 0 to {len(records) - 1}, one less than the records", shots)
    models = [dense] if pruned is None else [dense, pruned]
    drawn = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    views = []
    for i, record in enumerate(records):
        text, labels = presented(record)
        views.append((_examples(records, i, shots, drawn) + text, labels))
    encoded = [answer_tokens(tokenizer, *view) for view in views]
    rows = [prompt for prompt, _ in encoded]
    for model in models:
        check_rows(model, rows, "records")
    scores = [torch.zeros(len(METRICS), len(rows), dtype=torch.float64) for _ in models]
    restricted, full = (torch.zeros(len(DEVIATIONS), len(rows), dtype=torch.float64) for _ in range(2))
    tables: dict[int, TopTokens] = {}
    done = 0
    for numbers in batches(rows, ROWS_AT_ONCE):
        progress("answer tokens", done, len(rows))
        places = [[len(rows[i]) - 1] for i in numbers]
        both = [torch.cat(logits_at(model, [rows[i] for i in numbers], places)) for model in models]  # [B, V]
        if pruned is not None:
            full[:, numbers] = deviations(both[0], both[1])
        for at, i in enumerate(numbers):
            answers = torch.tensor(encoded[i][1])
            few = [logits[at : at + 1].double() for logits in both]
            for score, logits in zip(scores, few, strict=True):
                right = int(logits[0, answers].argmax()) == records[i].answer
                mass = logits[0].softmax(0)[answers].sum()
                score[:, i] = torch.tensor([float(right), float(mass)], dtype=torch.float64)
            if pruned is not None:
                restricted[:, i] = deviations(few[0][:, answers], few[1][:, answers])[:, 0]
            if i < shown:
                tokens = [_top(tokenizer, logits[0], top) for logits in few]
                answer = views[i][1][records[i].answer]
                tables[i] = TopTokens(views[i][0], answer, tokens[0], tokens[1] if pruned is not None else ())
        done += len(numbers)
    progress("answer tokens", len(rows), len(rows))
    named = [dict(zip(METRICS, score, strict=True)) for score in scores]
    spaces = [dict(zip(DEVIATIONS, values, strict=True)) if pruned is not None else {} for values in (restricted, full)]
    first = tuple(tables[i] for i in sorted(tables))
    return Categorical(named[0], named[1] if pruned is not None else {}, spaces[0], spaces[1], first)
