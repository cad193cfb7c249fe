"""How alike two sequences of tokens are, and how much one repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from ..base.errors import check

Tokens = Sequence[int]


def grams(tokens: Tokens, order: int) -> list[tuple[int, ...]]:
    """All n-grams of `order`, in their order; none where there are fewer tokens."""
    check(order >= 1, "order", "be at least 1", order)
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def overlap(a: Tokens, b: Tokens, order: int) -> float:
    """F1 of the n-grams that two sequences share, each counted as often as in the one that has it less often.

    1 where neither is long enough for one, 0 where one of the two is not.
    """
    first, second = Counter(grams(a, order)), Counter(grams(b, order))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def edit_distance(a: Tokens, b: Tokens) -> float:
    """Levenshtein distance over the longer length, in [0, 1]; 0 for two empty sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1] / max(len(a), len(b), 1)


def distinct(texts: Sequence[Tokens], order: int) -> float:
    """Different n-grams over all n-grams of all texts together; 0 where there is none (Li et al. 2016, 1510.03055)."""
    found = [gram for text in texts for gram in grams(text, order)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(tokens: Tokens, order: int = 4) -> float:
    """Share of the n-grams that are not the first of their kind; 0 where there is none."""
    found = grams(tokens, order)
    return 1 - len(set(found)) / len(found) if found else 0.0


def divergence(a: Tokens, b: Tokens) -> int | None:
    """The number, from 1, of the first token that differs, one of them being there at least; None for equal ones."""
    pairs = enumerate(zip(a, b, strict=False), 1)
    first = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)) + 1)
    return first if first <= max(len(a), len(b)) else None


def habits(texts: Sequence[Tokens]) -> dict[str, float]:
    """What one model's continuations are like: mean length, repeated 4-grams, distinct-1 and distinct-2."""
    return {
        "length": fmean(map(len, texts)),
        "repetition": fmean(map(repetition, texts)),
        "distinct1": distinct(texts, 1),
        "distinct2": distinct(texts, 2),
    }
