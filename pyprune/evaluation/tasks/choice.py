"""Multiple choice by log-likelihood: which option is likeliest after the prompt?

Three ways to score an option of several tokens, since a sum favours short ones: the sum of its tokens' log-likelihoods
(`accuracy`), their mean (`accuracy_token`), and the sum over the option's length in UTF-8 bytes (`accuracy_byte`, which
does not depend on the tokenizer; lm-eval's `acc_norm` divides by characters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.progress import Progress, quiet
from .encoding import Row, batches, check_rows, joined_ids, logits_at
from .records import ChoiceRecord, full_prompt
from .subspace import DEVIATIONS, at_last, deviations

METRICS = ("accuracy", "accuracy_token", "accuracy_byte")
Values = dict[str, Tensor]
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class OptionScores:
    """The options of one record.

    Attributes:
        log_likelihood: `[K]` float64, in nats, of each whole option given the prompt.
        tokens: `[K]`, of each option.
        size: `[K]`, UTF-8 bytes of each option.
    """

    log_likelihood: Tensor
    tokens: Tensor
    size: Tensor

    def answers(self) -> tuple[int, int, int]:
        """The option chosen by the sum, by the mean over tokens, and by the sum over bytes; the first of equals."""
        scores = self.log_likelihood, self.log_likelihood / self.tokens, self.log_likelihood / self.size
        first, second, third = (int(s.argmax()) for s in scores)
        return first, second, third


def option_scores(
    model: Any, tokenizer: Any, records: Sequence[ChoiceRecord], progress: Progress = quiet
) -> list[OptionScores]:
    """Log-likelihoods of all options of all records.

    Prompt and option are encoded as one text where the seam lies between tokens, else apart (`encoding.joined_ids`).

    Args:
        model: a causal LM of Transformers, in eval mode.
        tokenizer: its tokenizer.
        records: of any numbers of options.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no record, one longer than the model's context, or logits that are not finite.
    """
    encoded = [[joined_ids(tokenizer, full_prompt(r), option) for option in r.choices] for r in records]
    found = log_likelihoods(model, encoded, progress)
    return [
        OptionScores(
            of,
            torch.tensor([len(option) for _, option in options]),
            torch.tensor([len(option.encode()) for option in record.choices]),
        )
        for of, options, record in zip(found, encoded, records, strict=True)
    ]


def log_likelihoods(
    model: Any, encoded: Sequence[Sequence[tuple[Row, Row]]], progress: Progress = quiet, what: str = "records"
) -> list[Tensor]:
    """`[K]` float64 for each question, in nats: of each whole option after its prompt.

    Args:
        model: a causal LM of Transformers, in eval mode.
        encoded: token ids, for each question K pairs of a prompt and an option.
        progress: called as `(stage, done, total)`.
        what: the questions are called in errors.

    Raises:
        InputError: no question, one longer than the model's context, or logits that are not finite.
    """
    check(bool(encoded), what, "be at least one", len(encoded))
    pairs = [pair for options in encoded for pair in options]
    check_rows(model, [(*prompt, *option) for prompt, option in pairs], what)
    # The last token of an option is predicted and never read; what is left of one may begin another's.
    reads = [[(*prompt, *option[:-1]) for prompt, option in options] for options in encoded]
    longest = [_longest(options) for options in reads]
    rows = sorted({longest[i][row] for i, options in enumerate(reads) for row in options})
    served: dict[Row, list[int]] = {row: [] for row in rows}
    for pair, whole in enumerate(longest[i][row] for i, options in enumerate(reads) for row in options):
        served[whole].append(pair)
    found = torch.zeros(len(pairs), dtype=torch.float64)
    done = 0
    for numbers in batches(rows, _ROWS_AT_ONCE):
        progress("multiple choice", done, len(rows))
        batch = [rows[i] for i in numbers]
        places = [range(min(len(pairs[pair][0]) for pair in served[row]) - 1, len(row)) for row in batch]
        for row, place, logits in zip(batch, places, logits_at(model, batch, places), strict=True):
            likelihood = logits.double().log_softmax(-1)
            for pair in served[row]:
                prompt, option = pairs[pair]
                start = len(prompt) - 1 - place.start
                found[pair] = likelihood[range(start, start + len(option)), list(option)].sum()
        done += len(numbers)
    progress("multiple choice", len(rows), len(rows))
    return list(found.split([len(options) for options in encoded]))


def _longest(rows: Sequence[Row]) -> dict[Row, Row]:
    """For each row the longest one that begins with it, so that one pass serves both."""
    return {row: max((other for other in rows if other[: len(row)] == row), key=len) for row in rows}


def correct(scores: Sequence[OptionScores], records: Sequence[ChoiceRecord]) -> Values:
    """For each of `METRICS`, `[N]` float64: 1 where the record is answered right, 0 where not."""
    answers = torch.tensor([of.answers() for of in scores])
    right = torch.tensor([record.answer for record in records])
    return {name: (answers[:, i] == right).double() for i, name in enumerate(METRICS)}


def choice_correct(model: Any, tokenizer: Any, records: Sequence[ChoiceRecord], progress: Progress = quiet) -> Values:
    """What `correct` says of a model's `option_scores`.

    Raises:
        InputError: see `option_scores`.
    """
    return correct(option_scores(model, tokenizer, records, progress), records)


def option_deviations(
    dense: Any,
    pruned: Any,
    tokenizer: Any,
    records: Sequence[ChoiceRecord],
    scores: tuple[Sequence[OptionScores], Sequence[OptionScores]],
    progress: Progress = quiet,
) -> tuple[Values, Values]:
    """The options as a subspace: how far pruning moves their probabilities, beside those of all tokens.

    Args:
        dense, pruned, tokenizer, records, progress: as for `option_scores`.
        scores: of `dense` and of `pruned`.

    Returns:
        For each of `subspace.DEVIATIONS`, `[N]` float64: between the probabilities of whole options, renormalised over
        a record's options; and between those of all tokens, where the option begins.
    """
    pairs = zip(*scores, strict=True)
    found = torch.cat([deviations(a.log_likelihood[None], b.log_likelihood[None]) for a, b in pairs], dim=1)
    rows = [joined_ids(tokenizer, full_prompt(record), record.choices[0])[0] for record in records]
    return dict(zip(DEVIATIONS, found, strict=True)), at_last(dense, pruned, rows, progress)


def chance(records: Sequence[ChoiceRecord]) -> float:
    """The accuracy of guessing."""
    return sum(1 / len(record.choices) for record in records) / len(records)
