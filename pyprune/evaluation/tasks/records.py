"""Task files: JSON lines of one of three kinds, told apart by their fields.

    choice      {"prompt": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}
    generation  {"prompt": "The capital of France is", "answers": ["Paris"]}
    retrieval   {"query": "Who discovered penicillin?", "document": "Alexander Fleming noticed ..."}

`context` may hold text that stands on the lines before the prompt (an example, a passage), and `id` names what is
asked: files of different kinds that ask the same things under the same ids are compared fact by fact. Other fields are
left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.errors import InputError, check

DATA = Path(__file__).parent / "data"
# What is asked where no files are named: the same facts as choice, as generation and as yes or no, and passages to
# retrieve. What ships besides, after solved ones: reviews that are glad or not, and French and Spanish
# sentences to find the English of.
ASKED = ("choice", "generation", "yesno", "retrieval")
SHIPPED = (*ASKED, "sentiment", "translation")


@dataclass(frozen=True)
class ChoiceRecord:
    """Which of the choices follows the prompt?

    Attributes:
        prompt: text, not empty; a choice follows it after one space.
        choices: two or more different texts, none empty.
        answer: which of them is right, from 0.
        context: text on the lines before the prompt; may be empty.
        id: of what is asked; may be empty.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""
    id: str = ""


@dataclass(frozen=True)
class GenerationRecord:
    """What follows the prompt?

    Attributes:
        prompt: text, not empty.
        answers: one or more texts that are right, none empty.
        context: text on the lines before the prompt; may be empty.
        id: of what is asked; may be empty.
    """

    prompt: str
    answers: tuple[str, ...]
    context: str = ""
    id: str = ""


@dataclass(frozen=True)
class RetrievalRecord:
    """Which of the file's documents answers the query?

    Attributes:
        query: text, not empty.
        document: the one that answers it, not empty.
        id: of what is asked; may be empty.
    """

    query: str
    document: str
    id: str = ""


Record = ChoiceRecord | GenerationRecord | RetrievalRecord


def full_prompt(record: ChoiceRecord | GenerationRecord) -> str:
    """The context, if there is one, and the prompt on the line after it."""
    return f"{record.context}\n{record.prompt}" if record.context else record.prompt


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(entry: dict[str, Any], field: str, least: int, where: str) -> tuple[str, ...]:
    values = entry[field]
    right = isinstance(values, list) and len(values) >= least and all(_is_text(v) for v in values)
    check(right, f"{where}: {field}", f"be a list of at least {least} texts, none empty", values)
    return tuple(values)


def _text(entry: dict[str, Any], field: str, where: str) -> str:
    check(_is_text(entry[field]), f"{where}: {field}", "be a text that is not empty", entry[field])
    return str(entry[field])


def _optional(entry: dict[str, Any], field: str, where: str) -> str:
    value = entry.get(field, "")
    check(isinstance(value, str), f"{where}: {field}", "be a text", value)
    return str(value)


def _choice(entry: dict[str, Any], where: str) -> ChoiceRecord:
    prompt, choices, answer = _text(entry, "prompt", where), _texts(entry, "choices", 2, where), entry["answer"]
    check(len(set(choices)) == len(choices), f"{where}: choices", "differ from each other", list(choices))
    # True is an int to Python, and no row of a list to anybody else.
    number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    check(number, f"{where}: answer", f"be an integer from 0 to {len(choices) - 1}", answer)
    return ChoiceRecord(prompt, choices, answer, _optional(entry, "context", where), _optional(entry, "id", where))


def _generation(entry: dict[str, Any], where: str) -> GenerationRecord:
    prompt, answers = _text(entry, "prompt", where), _texts(entry, "answers", 1, where)
    return GenerationRecord(prompt, answers, _optional(entry, "context", where), _optional(entry, "id", where))


def _retrieval(entry: dict[str, Any], where: str) -> RetrievalRecord:
    return RetrievalRecord(_text(entry, "query", where), _text(entry, "document", where), _optional(entry, "id", where))


# kind -> (the fields that make it, how it is read)
KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str], Record]]] = {
    "choice": (("prompt", "choices", "answer"), _choice),
    "generation": (("prompt", "answers"), _generation),
    "retrieval": (("query", "document"), _retrieval),
}


def kind_of(records: tuple[Record, ...]) -> str:
    """`choice`, `generation` or `retrieval`: what `read_records` gave."""
    kinds = {ChoiceRecord: "choice", GenerationRecord: "generation", RetrievalRecord: "retrieval"}
    return kinds[type(records[0])]


def _kind(entry: Any, where: str) -> str:
    check(isinstance(entry, dict), where, "be a JSON object", type(entry).__name__)
    fitting = [kind for kind, (fields, _) in KINDS.items() if all(field in entry for field in fields)]
    wanted = "; or ".join(f"{', '.join(fields)} ({kind})" for kind, (fields, _) in KINDS.items())
    check(len(fitting) == 1, where, f"have the fields of one kind of task: {wanted}", sorted(entry))
    return fitting[0]


def read_records(path: str | Path) -> tuple[Record, ...]:
    """Read a task file; blank lines are skipped.

    Returns:
        Records of one kind, in the order of the file.

    Raises:
        InputError: a file that is missing, not UTF-8 or without a line; a line that is not JSON, without the fields of
            one kind, with a field of the wrong type, an empty text or an answer out of range; lines of different
            kinds. The message names file and line.
    """
    file = Path(path)
    check(file.is_file(), "task file", "be an existing file", str(path))
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"task file must be UTF-8; {file} is not ({error})") from error
    records: list[Record] = []
    first = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"task file must be JSON lines; {where} is not JSON ({error})") from error
        kind = _kind(entry, where)
        first = first or kind
        check(kind == first, where, f"be of the same kind as the lines before it ({first})", kind)
        records.append(KINDS[kind][1](entry, where))
    check(bool(records), "task file", "hold at least one task", f"none in {file}")
    return tuple(records)


def shipped(name: str) -> Path:
    """The path of a task file that ships with the package: one of `SHIPPED`."""
    return DATA / f"{name}.jsonl"
