"""All task types in one run: what a dense and a pruned model each score, and what of it was lost.

The files that ship ask the same facts as choice, as generation and as yes or no, so that the report can say which way
of asking suffers more, and not only which set of questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...base.errors import check
from ...base.memory import release
from ...base.progress import Progress, quiet
from ...model.families import decoder_layers
from . import choice, generation, retrieval, subspace
from .categorical import MOST_CHOICES, AnswerTokenError, categorical, in_words
from .estimates import Metric, Order, Scores, metric, order
from .records import ASKED, ChoiceRecord, GenerationRecord, Record, RetrievalRecord, kind_of, read_records, shipped

# kind of task -> the metric that stands for it where one must
MAIN = {"choice": "accuracy_token", "categorical": "accuracy", "generation": "exact", "retrieval": "mrr"}
Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class TaskResult:
    """One task.

    Attributes:
        name: of its file, with `, letters` where a choice file is asked by letters.
        kind: `choice`, `categorical`, `generation` or `retrieval`.
        items: how many were asked.
        metrics: by name.
        details: of two models, the `deviations` of the answers among themselves and of all tokens, where there are
            options; of a categorical task its `top` tokens; else empty.
        scores: the single scores of the metrics that have a chance, for two models.
    """

    name: str
    kind: str
    items: int
    metrics: dict[str, Metric]
    details: dict[str, Any]
    scores: dict[str, Scores]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the single scores."""
        metrics = {name: value.to_json() for name, value in self.metrics.items()}
        found = {"name": self.name, "kind": self.kind, "items": self.items, "main": MAIN[self.kind], "metrics": metrics}
        return {**found, **self.details}


@dataclass(frozen=True)
class TaskReport:
    """All tasks.

    Attributes:
        tasks: in the order of the files.
        orders: `(task, task of generation, which of them suffers more)`, for tasks that ask the same facts.
        skipped: `(task, why)`: answers that the tokenizer cannot say in one token.
        shots: solved records in front of each where answer tokens are looked at.
        seed: of the items drawn, of the shots and of the bootstrap.
    """

    tasks: tuple[TaskResult, ...]
    orders: tuple[tuple[str, str, Order], ...]
    skipped: tuple[tuple[str, str], ...]
    shots: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        orders = [{"tasks": [a, b], **found.to_json()} for a, b, found in self.orders]
        return {
            "tasks": [task.to_json() for task in self.tasks],
            "orders": orders,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "shots": self.shots,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Run:
    """What every task of a run is given."""

    dense: Any
    pruned: Any | None
    tokenizer: Any
    progress: Progress
    shots: int
    seed: int

    def both(self, score: Callable[[Any], Values]) -> tuple[Values, Values | None]:
        return score(self.dense), None if self.pruned is None else score(self.pruned)

    def result(
        self,
        name: str,
        kind: str,
        records: Sequence[Record],
        values: tuple[Values, Values | None],
        chances: dict[str, float],
        details: dict[str, Any] | None = None,
    ) -> TaskResult:
        dense, pruned = values
        metrics, scores = {}, {}
        ids = [record.id for record in records]
        for key in dense:
            theirs = None if pruned is None else pruned[key]
            metrics[key] = metric(dense[key], theirs, chances.get(key), self.seed)
            if theirs is not None and key in chances:
                scores[key] = Scores(ids, dense[key], theirs, chances[key])
        return TaskResult(name, kind, len(records), metrics, details or {}, scores)


def _categorical(run: _Run, name: str, records: Sequence[ChoiceRecord], chance: float) -> TaskResult:
    found = categorical(run.dense, run.pruned, run.tokenizer, records, run.progress, run.shots, seed=run.seed)
    both = found.dense, found.pruned or None
    return run.result(name, "categorical", records, both, {"accuracy": chance}, found.to_json(run.seed))


def _by_token(records: Sequence[ChoiceRecord]) -> bool:
    """Whether there are few enough options for each to be one token."""
    return max(len(record.choices) for record in records) <= MOST_CHOICES


def _choice(run: _Run, name: str, records: Sequence[ChoiceRecord], skipped: list[tuple[str, str]]) -> list[TaskResult]:
    """By likelihood of the options and by answer tokens; yes or no by these alone, for both would ask the same."""
    chance = choice.chance(records)
    words = all(in_words(record) for record in records)
    by_token: list[TaskResult] = []
    if _by_token(records):
        title = name if words else f"{name}, letters"
        try:
            by_token.append(_categorical(run, title, records, chance))
        except AnswerTokenError as error:
            skipped.append((title, str(error)))
    if words and by_token:
        return by_token
    models = [model for model in (run.dense, run.pruned) if model is not None]
    scores = [choice.option_scores(model, run.tokenizer, records, run.progress) for model in models]
    right = [choice.correct(of, records) for of in scores]
    details = {}
    if run.pruned is not None:
        both = scores[0], scores[1]
        spaces = choice.option_deviations(run.dense, run.pruned, run.tokenizer, records, both, run.progress)
        details = {"deviations": subspace.to_json(*spaces, run.seed)}
    values = right[0], right[1] if len(right) > 1 else None
    return [run.result(name, "choice", records, values, dict.fromkeys(choice.METRICS, chance), details), *by_token]


def _generation(run: _Run, name: str, records: Sequence[GenerationRecord]) -> list[TaskResult]:
    values = run.both(lambda model: generation.generation_scores(model, run.tokenizer, records, progress=run.progress))
    return [run.result(name, "generation", records, values, dict.fromkeys(generation.METRICS, 0.0))]


def _retrieval(run: _Run, name: str, records: Sequence[RetrievalRecord]) -> list[TaskResult]:
    """By the last hidden state, and by that of the middle of the model."""
    guessed = retrieval.chances(len(records))

    def score(model: Any) -> Values:
        layers = (None, len(decoder_layers(model)[1]) // 2)  # of its own: it may have lost layers
        last, middle = retrieval.retrieval_scores(model, run.tokenizer, records, layers, progress=run.progress)
        return {**last, **{f"{key}_middle": value for key, value in middle.items()}}

    chances = {key + suffix: value for key, value in guessed.items() for suffix in ("", "_middle")}
    return [run.result(name, "retrieval", records, run.both(score), chances)]


def _drawn(records: tuple[Record, ...], items: int | None, seed: int) -> tuple[Record, ...]:
    if items is None or items >= len(records):
        return records
    # Files of one length give the same places, so what ships stays paired.
    places = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:items].sort().values
    return tuple(records[int(i)] for i in places)


def _check_models(dense: Any, pruned: Any | None) -> None:
    for name, model in (("dense", dense), ("pruned", pruned)):
        check(model is None or not model.training, name, "be in eval mode", "a model in training mode")
    if pruned is not None:
        sizes = [getattr(model.config, "vocab_size", None) for model in (dense, pruned)]
        check(sizes[0] == sizes[1], "pruned", f"have the dense model's vocabulary of {sizes[0]}", sizes[1])


def _orders(tasks: Sequence[TaskResult], seed: int) -> list[tuple[str, str, Order]]:
    """Every task but retrieval against every task of generation."""
    found = []
    for first in tasks:
        for second in tasks:
            if first.kind in ("choice", "categorical") and second.kind == "generation":
                one = order(first.scores[MAIN[first.kind]], second.scores[MAIN[second.kind]], seed)
                found += [(first.name, second.name, one)] if one is not None else []
    return found


def read_tasks(
    files: Sequence[str | Path] | None, items: int | None, shots: int, seed: int
) -> list[tuple[str, tuple[Record, ...]]]:
    """The name and the records of each task; arguments and errors as in `run_tasks`."""
    check(items is None or items >= 2, "items", "be at least 2, or None for all", items)
    paths = [shipped(name) for name in ASKED] if files is None else [Path(file) for file in files]
    check(bool(paths), "files", "be at least one, or None for those of the package", paths)
    names = [path.stem for path in paths]
    check(len(set(names)) == len(names), "files", "have different names, which are the tasks'", names)
    tasks = [(name, _drawn(read_records(path), items, seed)) for name, path in zip(names, paths, strict=True)]
    for name, records in tasks:
        if kind_of(records) == "choice" and _by_token(cast(Sequence[ChoiceRecord], records)):
            rule = f"be from 0 to {len(records) - 1}, one less than the records of {name}"
            check(0 <= shots < len(records), "shots", rule, shots)
    return tasks


def run_tasks(
    dense: Any,
    pruned: Any | None,
    tokenizer: Any,
    files: Sequence[str | Path] | None = None,
    items: int | None = None,
    progress: Progress = quiet,
    shots: int = 0,
    seed: int = 0,
) -> TaskReport:
    """Ask one model, or two the same questions.

    Args:
        dense, pruned: causal LMs of Transformers, in eval mode, of one vocabulary; `pruned` may be None.
        tokenizer: theirs.
        files: task files (see `records`); None for those of `records.ASKED`.
        items: of each file at most, drawn with the seed; at least 2; None for all.
        progress: called as `(stage, done, total)`.
        shots: solved records in front of each where answer tokens are looked at (see `categorical`).
        seed: of the items drawn, of the shots and of the bootstrap.

    Raises:
        InputError: a file that breaks the rules of `records.read_records`, two of one name, less than two items, no
            more items than shots, models of different vocabularies, prompts longer than a model's context, answers by
            letter that are not one token.
    """
    _check_models(dense, pruned)
    # All files are read before the first model runs: a mistake in the last one should not cost the time of the others.
    tasks = read_tasks(files, items, shots, seed)
    run = _Run(dense, pruned, tokenizer, progress, shots, seed)
    results: list[TaskResult] = []
    skipped: list[tuple[str, str]] = []
    with torch.no_grad():
        for name, records in tasks:
            kind = kind_of(records)
            release()
            if kind == "choice":
                results += _choice(run, name, cast(Sequence[ChoiceRecord], records), skipped)
            elif kind == "generation":
                results += _generation(run, name, cast(Sequence[GenerationRecord], records))
            else:
                results += _retrieval(run, name, cast(Sequence[RetrievalRecord], records))
    orders = _orders(results, seed) if pruned is not None else []
    return TaskReport(tuple(results), tuple(orders), tuple(skipped), shots, seed)
