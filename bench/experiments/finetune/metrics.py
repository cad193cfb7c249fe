"""Metrics of generated text, each as statistics of an example that add up, so that one bootstrap serves them all.

BLEU and its tokenisation are sacrebleu's; the others are a few lines each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

Array = NDArray[np.float64]
_ORDERS, _BETA = 6, 2
_BLEU = BLEU(effective_order=True)  # for the statistics of a sentence, which are the same either way


def bleu_statistics(text: str, references: Sequence[str]) -> list[float]:
    """Matched and counted n-grams of orders 1..4, length, length of the closest reference."""
    found = _BLEU.sentence_score(text, list(references))
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def bleu_score(sums: Array) -> float:
    """Corpus BLEU, 0..100 (Papineni et al. 2002), smoothed as sacrebleu does by default."""
    counts, totals = [int(v) for v in sums[:4]], [int(v) for v in sums[4:8]]
    return float(BLEU.compute_bleu(counts, totals, int(sums[8]), int(sums[9]), smooth_method="exp").score)


def _character_ngrams(text: str) -> list[Counter[str]]:
    dense = "".join(text.split())
    return [Counter(dense[i : i + n] for i in range(len(dense) - n + 1)) for n in range(1, _ORDERS + 1)]


def chrf_statistics(text: str, references: Sequence[str]) -> list[float]:
    """Counted n-grams of the text and of its best reference, and those in both, for character orders 1..6."""
    mine = _character_ngrams(text)
    best: list[float] = [0.0] * (3 * _ORDERS)
    for number, reference in enumerate(references):
        row: list[float] = []
        for a, b in zip(mine, _character_ngrams(reference), strict=True):
            row += [a.total() if b else 0, b.total(), (a & b).total()]
        if not number or chrf_score(np.array(row)) > chrf_score(np.array(best)):
            best = row
    return best


def chrf_score(sums: Array) -> float:
    """chrF2, 0..100 (Popovic 2015): F of mean precision and mean recall over the orders that both sides have."""
    counted, wanted, matched = sums.reshape(_ORDERS, 3).T
    usable = (counted > 0) & (wanted > 0)
    if not matched.any():
        return 0.0
    precision, recall = (matched[usable] / counted[usable]).mean(), (matched[usable] / wanted[usable]).mean()
    return float(100 * (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = 0
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], above + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l_statistics(text: str, references: Sequence[str]) -> list[float]:
    """F1 of the longest common subsequence of words with the best reference (Lin 2004), and 1."""
    mine, best = _words(text), 0.0
    for reference in map(_words, references):
        if mine and reference:
            best = max(best, 2 * _common(mine, reference) / (len(mine) + len(reference)))
    return [best, 1.0]


def exact_statistics(text: str, references: Sequence[str]) -> list[float]:
    """1 where the text equals a reference, white space apart, and 1."""
    return [float(text.split() in [reference.split() for reference in references]), 1.0]


def _edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions from one to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def phoneme_error_statistics(text: str, references: Sequence[str]) -> list[float]:
    """Edits to the closest reference, and its length."""
    mine = text.split()
    edits, length = min((_edits(mine, reference.split()), len(reference.split())) for reference in references)
    return [float(edits), float(length)]


def ratio(sums: Array) -> float:
    """Per cent."""
    return float(100 * sums[0] / sums[1])


def perplexity_score(sums: Array) -> float:
    """exp of summed negative log-likelihood (nats) over tokens."""
    mean = sums[0] / sums[1]
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and read.

    Attributes:
        label: its name in tables.
        statistics: (text, references) -> numbers that add up over examples.
        score: their sums -> the metric.
        higher: whether more is better.
    """

    label: str
    statistics: Callable[[str, Sequence[str]], list[float]]
    score: Callable[[Array], float]
    higher: bool = True


METRICS = {
    "bleu": Metric("BLEU", bleu_statistics, bleu_score),
    "chrf": Metric("chrF", chrf_statistics, chrf_score),
    "rouge_l": Metric("ROUGE-L", rouge_l_statistics, ratio),
    "exact": Metric("exact match, %", exact_statistics, ratio),
    "phoneme_error": Metric("phoneme error, %", phoneme_error_statistics, ratio, higher=False),
}
