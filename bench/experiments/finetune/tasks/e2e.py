"""E2E NLG: restaurant attributes -> a sentence (Novikova, Dusek and Rieser 2017, arXiv 1706.09254).

Trained on the development set, evaluated on the distinct inputs of the test set with all their references: the
challenge's training file is ten times as large, so scores here are not those of the challenge. The development set
knows one `eatType` and two kinds of `food` only; a model that cannot copy is therefore given, and writes, placeholders
for the values of open slots, as the challenge's own baseline does for names.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from pyprune.base.errors import InputError, check

from .base import Example, Task

TRAIN, TEST = "devset.csv", "testset_w_refs.csv"
# Slots whose values the test set has and the development set lacks, and the word that stands for the value.
OPEN = {"name": "Xname", "near": "Xnear", "food": "Xfood", "eatType": "Xtype"}
_SLOT = re.compile(r"([^\[\],][^\[\]]*)\[([^\]]*)\]")
METRICS = ("bleu", "chrf", "rouge_l", "exact")


def read(path: Path) -> dict[str, list[str]]:
    """Inputs and their references, in the order of the file.

    Raises:
        InputError: no such file, or one without the columns `mr` and `ref`, or without a row.
    """
    check(path.is_file(), "data", f"be a folder that holds {path.name}", str(path))
    found: dict[str, list[str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("mr") or not row.get("ref"):
                raise InputError(f"data must have columns 'mr' and 'ref' in every row; {path.name} has {dict(row)}")
            found.setdefault(row["mr"].strip(), []).append(row["ref"].strip())
    check(bool(found), "data", f"have rows in {path.name}", 0)
    return found


def delexicalise(prompt: str, references: list[str]) -> Example:
    """The example with placeholders; a reference that lacks the literal value of an open slot is no target."""
    slots = [(OPEN[key.strip()], value) for key, value in _SLOT.findall(prompt) if key.strip() in OPEN and value]
    targets = list(references)
    for placeholder, value in slots:
        prompt = prompt.replace(f"[{value}]", f"[{placeholder}]", 1)
        literal = re.compile(re.escape(value), re.IGNORECASE)
        targets = [literal.sub(placeholder, text) for text in targets if literal.search(text)]
    return Example(prompt, tuple(references), tuple(targets), tuple(slots))


def load(data: Path | None, lexical: bool) -> Task:
    """The task.

    Args:
        data: the folder of both files.
        lexical: as it stands; else with placeholders.

    Raises:
        InputError: no folder, or a file in it that is not as expected.
    """
    check(data is not None, "data", f"name the folder of {TRAIN} and {TEST}", data)
    assert data is not None
    found = []
    for name in (TRAIN, TEST):
        examples = read(data / name).items()
        found.append(tuple(Example(p, tuple(r), tuple(r)) if lexical else delexicalise(p, r) for p, r in examples))
    train, test = found
    seen = {e.prompt for e in train} if lexical else set()
    test = tuple(e for e in test if e.prompt not in seen)
    form = "values as they stand" if lexical else f"placeholders for {', '.join(OPEN)}, put back before scoring"
    note = f"E2E NLG, trained on {TRAIN}, evaluated on distinct inputs of {TEST} with all references; {form}"
    return Task("e2e", train, test, METRICS, note)
