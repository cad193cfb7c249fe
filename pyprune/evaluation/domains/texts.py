"""Six kinds of text to judge a language model on, and PIQA's questions: read whole, before any model is loaded."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ...base.errors import InputError, check, is_count
from ...base.text import DEFAULT_TEXT, default_text, halves, module_source
from ..tasks.records import ChoiceRecord

# Modules of good size that every CPython from 3.11 carries as source, but none that `builtin` calibration reads.
MODULES = (
    *("tarfile", "zipfile", "turtle", "_pydecimal", "_pydatetime", "difflib", "doctest", "pdb", "pickletools"),
    *("optparse", "mailbox", "imaplib", "ipaddress", "statistics", "configparser", "shutil", "threading", "ssl"),
    *("traceback", "fractions"),
)
# Characters of a passage of source code, at least: some 700 tokens, so that a few thousand tokens see many modules.
_PASSAGE = 2400
_WINE = "webtext/wine.txt"
PIQA = ("piqa/valid.jsonl", "piqa/valid-labels.lst")


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: one of `NAMES`.
        source: what was read, for reports.
        documents: texts, none empty.
    """

    name: str
    source: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What a suite measures on.

    Attributes:
        domains: those that are here, in the order of `NAMES`.
        missing: names of those that need a data folder, where none was given.
        questions: of PIQA; none without a data folder.
    """

    domains: tuple[Domain, ...]
    missing: tuple[str, ...] = ()
    questions: tuple[ChoiceRecord, ...] = ()


def _python_docs() -> tuple[str, ...]:
    return (halves(default_text())[1],)


def _passages(text: str) -> Iterator[str]:
    """Text in passages of `_PASSAGE` characters and more, cut at blank lines; what is left at its end is dropped."""
    passage = ""
    for block in text.split("\n\n"):
        passage = f"{passage}\n\n{block}" if passage else block
        if len(passage) >= _PASSAGE:
            yield passage
            passage = ""


def _python_source() -> tuple[str, ...]:
    """Passages of the second halves of `MODULES`, one of each module in turn."""
    found = {name: module_source(name) for name in MODULES}
    if found["_pydatetime"] is None:  # before 3.12
        found["_pydatetime"] = module_source("datetime")
    columns = [list(_passages(halves(text)[1])) for text in found.values() if text is not None]
    return tuple(passage for passage in chain(*zip_longest(*columns)) if passage)


def _wikipedia(content: str, where: str) -> list[str]:
    return [halves(content)[1]]


def _wine(content: str, where: str) -> list[str]:
    return [content]


def _restaurants(content: str, where: str) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(content)))
    check(bool(rows) and "ref" in rows[0], where, "be CSV with a column 'ref'", list(rows[0]) if rows else "no row")
    return _mixed(list(dict.fromkeys(row["ref"] or "" for row in rows)))


def _mathematics(content: str, where: str) -> list[str]:
    entries = json_lines(content, where, ("question", "answer"))
    return _mixed([f"{entry['question']}\n{entry['answer']}" for entry in entries])


def _mixed(documents: list[str]) -> list[str]:
    """In an order that is always the same, so that a part stands for the whole and not for its first rows."""
    random.Random(0).shuffle(documents)
    return documents


# Name -> its file in the data folder, and how that is read; None for what CPython carries.
_FILES: dict[str, tuple[str, Callable[[str, str], list[str]]] | None] = {
    "wikipedia": ("wikitext-2/valid.txt", _wikipedia),
    "python-docs": None,
    "python-source": None,
    "restaurants": ("e2e-nlg/testset_w_refs.csv", _restaurants),
    "mathematics": ("gsm8k/test.jsonl", _mathematics),
    "wine": (_WINE, _wine),
}
NAMES = tuple(_FILES)
_CARRIED = {
    "python-docs": (f"{DEFAULT_TEXT} (second half)", _python_docs),
    "python-source": ("modules of the standard library (second halves)", _python_source),
}


def json_lines(content: str, where: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines text; blank lines are skipped.

    Raises:
        InputError: a line that is no JSON object with these fields as texts that are not empty.
    """
    entries = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}:{number} must be JSON ({error})") from error
        right = isinstance(entry, dict) and all(
            isinstance(entry.get(field), str) and entry[field].strip() for field in fields
        )
        check(right, f"{where}:{number}", f"be an object with {' and '.join(fields)}, texts that are not empty", line)
        entries.append(entry)
    return entries


def _content(folder: Path, name: str) -> str:
    """The text of a file in a data folder; the wine notes are in Latin-1, as NLTK has them."""
    path = folder / name
    check(path.is_file(), "data", f"be a folder that holds {name}", str(folder))
    try:
        return path.read_text(encoding="latin-1" if name == _WINE else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data must be UTF-8; {path} is not ({error})") from error


def _domain(name: str, folder: Path | None) -> Domain | None:
    """One domain, or None where it needs a folder and there is none."""
    file = _FILES[name]
    if file is None:
        source, make = _CARRIED[name]
        documents = list(make())
    elif folder is None:
        return None
    else:
        source, read = file
        documents = read(_content(folder, source), str(folder / source))
    check(bool(documents), name, "have a text", source)
    empty = [number for number, text in enumerate(documents, 1) if not text.strip()]
    check(not empty, name, f"hold documents that are not empty; of {source} these are", empty[:3])
    return Domain(name, source, tuple(documents))


def read_questions(folder: Path, items: int = 0) -> tuple[ChoiceRecord, ...]:
    """PIQA's questions in a data folder, the first `items` of them, or all for 0.

    A question's prompt is `Question: GOAL`, a line break and `Answer:`, as in other evaluations (Bisk et al. 2020,
    1911.11641).

    Raises:
        InputError: a missing file, one that is not as PIQA's, or another number of labels than of questions.
    """
    texts, labels = (_content(folder, name) for name in PIQA)
    entries = json_lines(texts, str(folder / PIQA[0]), ("goal", "sol1", "sol2"))
    answers = labels.split()
    check(bool(entries), "data", "hold a question of PIQA", str(folder / PIQA[0]))
    check(len(answers) == len(entries), PIQA[1], f"hold a label for each of {len(entries)} questions", len(answers))
    strange = next((answer for answer in answers if answer not in ("0", "1")), None)
    check(strange is None, PIQA[1], "hold labels that are 0 or 1", strange)
    found = [
        ChoiceRecord(f"Question: {entry['goal'].strip()}\nAnswer:", (entry["sol1"], entry["sol2"]), int(answer))
        for entry, answer in zip(entries, answers, strict=True)
    ]
    return tuple(found[:items] if items else found)


def read_material(data: str | Path | None = None, items: int = 0) -> Material:
    """Read all domains, and PIQA.

    Args:
        data: a folder with `wikitext-2/valid.txt`, `e2e-nlg/testset_w_refs.csv`, `gsm8k/test.jsonl`, `webtext/wine.txt`
            and PIQA's `piqa/valid.jsonl` and `piqa/valid-labels.lst`; None for the two domains that CPython carries.
        items: questions of PIQA at most; 0 for all.

    Raises:
        InputError: no such folder, a file that it lacks or that is not as it should be, an empty document.
    """
    check(is_count(items), "items", "be 0 (for all) or more", items)
    folder = None if data is None else Path(data)
    check(folder is None or folder.is_dir(), "data", "be an existing folder", str(data))
    found = {name: _domain(name, folder) for name in NAMES}
    domains = tuple(domain for domain in found.values() if domain is not None)
    missing = tuple(name for name, domain in found.items() if domain is None)
    return Material(domains, missing, () if folder is None else read_questions(folder, items))
