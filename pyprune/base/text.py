"""Files -> documents. Local files come first; where the user gives none, prose that every CPython carries."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, check

DEFAULT_TEXT = "pydoc_data.topics"
# Fields of instruction data, in the order in which they are looked for: what is asked, and what is answered.
_ASKED = ("instruction", "question", "prompt")
_ANSWERED = ("output", "response", "answer", "completion")
_FIELDS = "'text', 'messages', or an instruction with its answer"


@dataclass(frozen=True)
class Exchange:
    """A conversation, which a model reads in the words of its own chat template.

    Attributes:
        messages: each with `role` and `content`.
        plain: the same without a template, for a tokenizer that has none; None where only a template will do.
        place: file and line, for errors.
    """

    messages: tuple[dict[str, Any], ...]
    plain: str | None = None
    place: str = "text"


Document = str | Exchange


def default_text() -> str:
    """English technical prose that ships with CPython (the topics of `help()`), in a fixed order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def module_source(module: str) -> str | None:
    """Of a module that CPython carries, without running it; None where there is no source."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py") or not Path(spec.origin).is_file():
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def _exchange(entry: dict[str, Any], place: str) -> Exchange | None:
    """The conversation of a record, or None where it is none."""
    messages = entry.get("messages")
    if messages is not None:
        right = isinstance(messages, list) and bool(messages)
        right = right and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        right = right and all(isinstance(m.get("content"), str) for m in messages)
        check(right, f"{place}: messages", "be a list of objects with strings 'role' and 'content'", messages)
        return Exchange(tuple(messages), place=place)
    asked = next((entry[k] for k in _ASKED if isinstance(entry.get(k), str)), None)
    answered = next((entry[k] for k in _ANSWERED if isinstance(entry.get(k), str)), None)
    if asked is None or answered is None:
        return None
    more = entry.get("input")
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    said = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Exchange(said, f"{asked}\n{answered}", place)


def _record(line: str, place: str) -> Document:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"text must be JSON lines; {place} is not JSON ({error})") from error
    found = entry if isinstance(entry, dict) else {}
    if isinstance(found.get("text"), str):
        return str(found["text"])
    exchange = _exchange(found, place)
    if exchange is None:
        raise InputError(f"text must have a string field {_FIELDS} in every line; {place} has none")
    return exchange


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a file: a UTF-8 text file is one, each line of a `.jsonl` file is one.

    A line is an object with `text`; or with `messages`, each of `role` and `content`; or with an instruction
    (`instruction`, `question` or `prompt`, and maybe `input`) and its answer (`output`, `response`, `answer` or
    `completion`).

    Raises:
        InputError: missing file, not UTF-8, or a line that is no such object.
    """
    file = Path(path)
    check(file.is_file(), "text", "be an existing file", str(path))
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text must be UTF-8; {file} is not ({error})") from error
    if file.suffix != ".jsonl":
        return [content]
    return [_record(line, f"{file}:{n}") for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def halves(text: str) -> tuple[str, str]:
    """Split at the first paragraph break after the middle, or else the last before it, or else in the middle."""
    middle = len(text) // 2
    breaks = text.find("\n\n", middle), text.rfind("\n\n", 0, middle + 1)
    cut = next((cut for cut in breaks if cut >= 0), middle)
    return text[:cut], text[cut:]


def plain_text(documents: Sequence[Document]) -> str:
    """All of it as one text, without templates; conversations that need one are left out."""
    words = [d if isinstance(d, str) else d.plain for d in documents]
    return "\n\n".join(word for word in words if word is not None)


def _half(found: list[Document], second: bool) -> list[Document]:
    if len(found) == 1 and isinstance(found[0], str):
        return [halves(found[0])[second]]
    middle = (len(found) + 1) // 2
    return found[middle:] if second else found[:middle]


def file_and_half(path: str | Path) -> tuple[str, str]:
    """A file's name, and `first` or `second` where that half of it is meant, else nothing."""
    name, _, half = str(path).rpartition(":")
    return (name, half) if half in ("first", "second") else (str(path), "")


def load_text(path: str | Path | None, part: str) -> tuple[list[Document], str]:
    """The documents to use and their name in reports.

    Args:
        path: a file, whole; a file with `:first` or `:second` appended for half of it; or None for the default text,
            of which calibration takes the first half and evaluation the second.
        part: `first` or `second`, the half of the default text.

    Raises:
        InputError: see `read_documents`.
    """
    if path is None:
        return [halves(default_text())[part == "second"]], f"{DEFAULT_TEXT} ({part} half)"
    file, half = file_and_half(path)
    if half:
        return _half(read_documents(file), half == "second"), f"{Path(file).name} ({half} half)"
    return read_documents(file), Path(file).name
