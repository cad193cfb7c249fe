"""Calibration text from several sources, in shares: files, text of the model's own, and what every CPython carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import InputError, check, is_finite
from ..base.progress import Progress, quiet
from ..base.text import DEFAULT_TEXT, Document, file_and_half, load_text, module_source
from ..base.windows import check_size, cut, start_ids, token_stream
from ..model.weights import sketch
from . import written

SELF, BUILTIN = "self", "builtin"
# Modules that every CPython carries as source code; other ones are left to evaluations.
CODE = ("argparse", "ast", "collections", "dataclasses", "email.message", "functools", "inspect", "logging", "pathlib")
# What is read where nobody names a text, and the parts of what has several, by weight (bench/notes/quality.md).
DEFAULT = {SELF: 3.0, BUILTIN: 1.0}
# What a pruned model is taught by where nobody names a text: answers matter more to it than to a ranking of neurons.
_LESSONS = {f"{SELF}:plain": 2.0, f"{SELF}:chat": 1.0, BUILTIN: 1.0}
_PARTS = {BUILTIN: {"prose": 1.0, "code": 1.0}, SELF: {"plain": 1.0, "chat": 0.0}}


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows, and where each is from.

    Attributes:
        ids: `[N, W]` int64.
        sources: `[N]` int64, each window's place in `names`; the windows of every source are spread evenly over all.
        names: of the sources.
    """

    ids: Tensor
    sources: Tensor
    names: tuple[str, ...]

    def first(self, count: int) -> Windows:
        """The first `count` windows."""
        return Windows(self.ids[:count], self.sources[:count], self.names)

    def facts(self) -> list[dict[str, Any]]:
        """What was used, by source: `source`, `tokens`, and their `share` of all."""
        counts = [int((self.sources == i).sum()) for i in range(len(self.names))]
        shares = [count / max(1, len(self.ids)) for count in counts]
        parts = zip(self.names, counts, shares, strict=True)
        return [{"source": n, "tokens": c * self.ids.shape[1], "share": s} for n, c, s in parts]

    @property
    def name(self) -> str:
        """In one line, for reports."""
        if len(self.names) == 1:
            return self.names[0]
        return " + ".join(f"{fact['source']} {fact['share']:.0%}" for fact in self.facts())


def unread(seed: int) -> int:
    """The seed of text that pruning with `seed` has not read: the fit has learnt already what that text can teach."""
    return seed + 1


def lessons(tokenizer: Any) -> dict[str, float]:
    """The sources to recover with: those of pruning, a quarter of them in the chat template where there is one."""
    return dict(_LESSONS if getattr(tokenizer, "chat_template", None) else DEFAULT)


def unnamed(ids: Tensor) -> Windows:
    """Windows (`[N, W]` token ids) of one source without a name."""
    return Windows(ids, torch.zeros(len(ids), dtype=torch.int64), ("",))


Mixture = Mapping[Any, float] | Sequence[str | Path]


def parse(words: Iterable[str]) -> dict[str, float]:
    """Sources with their weights from short forms: `NAME` or `NAME@WEIGHT`, a weight being 1 unless it is given.

    Raises:
        InputError: a weight that is no number, or a source that is named twice.
    """
    found: dict[str, float] = {}
    for word in words:
        name, mark, number = word.rpartition("@")
        if not mark or Path(word).is_file():
            name, number = word, "1"
        try:
            weight = float(number)
        except ValueError as error:
            raise InputError(f"text must be SOURCE or SOURCE@WEIGHT, the weight a number; got {word!r}") from error
        check(name not in found, "text", "name each source once", name)
        found[name] = weight
    return found


def check_sources(mixture: Mapping[str, float]) -> dict[str, float]:
    """Sources with their weights, as they are.

    Raises:
        InputError: no source, weights that are negative, not finite or sum to zero, or a file that is not there.
    """
    check(len(mixture) > 0, "text", "name at least one source", list(mixture))
    for name, weight in mixture.items():
        check(is_finite(weight) and weight >= 0, f"weight of {name}", "be 0 or more, and finite", weight)
    check(sum(mixture.values()) > 0, "text", "have weights that do not sum to zero", list(mixture.values()))
    for name in mixture:
        own, _, part = name.partition(":")
        parts = _PARTS.get(own)
        if parts is None:
            file = file_and_half(name)[0]
            check(Path(file).is_file(), "text", f"be an existing file, {SELF} or {BUILTIN}", file)
        else:
            check(not part or part in parts, "text", f"be {own}, or of it {', '.join(parts)}", name)
    return dict(mixture)


def _code() -> list[Document]:
    """Source code of the standard library."""
    return [source for name in CODE if (source := module_source(name)) is not None]


def _expanded(mixture: Mapping[str, float]) -> dict[str, float]:
    """Sources of several parts as those parts."""
    found: dict[str, float] = {}
    for name, weight in mixture.items():
        if weight > 0:
            parts = {part: share for part, share in _PARTS.get(name, {}).items() if share}
            total = sum(parts.values())
            found |= {f"{name}:{part}": weight * share / total for part, share in parts.items()} or {name: weight}
    return found


def _counts(weights: Sequence[float], windows: int) -> list[int]:
    """Windows of each source: at least one, and else by weight, the largest remainders rounded up."""
    total = sum(weights)
    exact = [max(1.0, windows * weight / total) for weight in weights]
    counts = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: max(0, windows - sum(counts))]:
        counts[i] += 1
    while sum(counts) > windows and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
    return counts


def _spread(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The windows of all sources in one order in which each is spread evenly, and the source of each."""
    places = torch.cat([(torch.arange(len(p)) + 0.5) / len(p) for p in parts])
    sources = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
    order = places.argsort(stable=True)
    return torch.cat(list(parts))[order], sources[order]


def mix(
    mixture: Mixture,
    model: nn.Module | None,
    tokenizer: Any,
    tokens: int,
    window: int,
    *,
    start: str = "auto",
    seed: int = 0,
    progress: Progress = quiet,
) -> Windows:
    """Windows from several sources.

    Args:
        mixture: sources with their weights, or sources that weigh the same. A source is a file (see `load_text`),
            `self` (see `written`; from the start of a text, as `self:plain`; `self:chat` is written in the
            model's chat template) or `builtin` (half prose, half source code that CPython carries;
            `builtin:prose`, `builtin:code`).
        model: the dense model, which writes `self`; None where no source is.
        tokenizer: its own.
        tokens: in all; 0 for all of the files, where every source is one. A source that holds less than its share
            gives what it holds.
        window: tokens in a window.
        start: see `windows.start_ids`.
        seed: of what is sampled.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: weights that are negative, not finite or sum to zero; a source shorter than a window; and see
            `load_text`, `token_windows`, `written.write`.
    """
    given = {str(k): v for k, v in mixture.items()} if isinstance(mixture, Mapping) else {str(k): 1.0 for k in mixture}
    check_sources(given)
    check_size(tokens, window)
    chosen = _expanded(given)
    own = [name for name in chosen if name.partition(":")[0] == SELF]
    check(tokens > 0 or not own, "tokens", "be given with text 'self', which has no end", tokens)
    check(model is not None or not own, "text", "be token ids or files where there is no model to write 'self'", own)
    head = start_ids(tokenizer, start)
    check(len(head) < window - 1, "window", f"be longer than the start of a text ({len(head)} tokens)", window)
    counts = _counts(list(chosen.values()), tokens // window) if tokens else [0] * len(chosen)
    parts, names = [], []
    for name, count in zip(chosen, counts, strict=True):
        needed = count * window
        if name in own and model is not None:
            kind = name.partition(":")[2]
            row, called = written.stream(model, tokenizer, needed, kind, seed, sketch(model), progress), name
        else:
            documents, called = _documents(name)
            row = token_stream(tokenizer, documents, head, needed)
        found = cut(row, window, head, count or None)
        check(len(found) > 0, f"text {called}", f"hold at least one window of {window} tokens", f"{len(row)} tokens")
        parts.append(found)
        names.append(called)
    ids, sources = _spread(parts)
    return Windows(ids, sources, tuple(names))


def _documents(name: str) -> tuple[list[Document], str]:
    if name == f"{BUILTIN}:prose":
        return load_text(None, "first")[0], f"{DEFAULT_TEXT} (first half)"
    return (_code(), name) if name == f"{BUILTIN}:code" else load_text(name, "first")
