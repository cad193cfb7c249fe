"""Language modelling of WikiText-2 (Merity, Xiong, Bradbury and Socher 2016, arXiv 1609.07843), judged by perplexity.

From the validation split alone: its first half trains, its second half judges. Pieces of as many words are learned
and judged each by itself, after a line break and with no end: what stands before them is not seen, so perplexities are
higher than over long windows.
"""

from __future__ import annotations

import re
from pathlib import Path

from pyprune.base.errors import check

from .base import Example, Task

FILE = "valid.txt"
# Words of a piece, some 130 tokens.
PIECE = 100


def pieces(text: str) -> list[str]:
    """The text cut every `PIECE` words, white space between them as it was; fewer words at the end are left out."""
    words = re.findall(r"\S+\s*", text)
    return ["".join(words[at : at + PIECE]).strip() for at in range(0, len(words) - PIECE + 1, PIECE)]


def load(data: Path | None, lexical: bool) -> Task:
    """The task; `lexical` changes nothing.

    Raises:
        InputError: no folder, or no file with a piece for each half in it.
    """
    check(data is not None, "data", f"name the folder of WikiText-2's {FILE}", data)
    assert data is not None
    check((data / FILE).is_file(), "data", f"be a folder that holds {FILE}", str(data))
    found = pieces((data / FILE).read_text(encoding="utf-8"))
    check(len(found) > 1, "data", f"have at least {2 * PIECE} words in {FILE}", str(data))
    train, test = found[: len(found) // 2], found[len(found) // 2 :]
    note = (
        f"WikiText-2, {FILE} in pieces of {PIECE} words; the first half trains ({len(train)} pieces), the second judges"
    )
    halves = [tuple(Example("", (piece,), (piece,)) for piece in half) for half in (train, test)]
    return Task("wikitext", halves[0], halves[1], (), note, ends=False)
