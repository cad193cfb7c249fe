"""Task files: what is read, what is refused and in which words, and that what ships is what its tables say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from pyprune import InputError
from pyprune.evaluation.tasks import ChoiceRecord, GenerationRecord, RetrievalRecord, read_records, shipped
from pyprune.evaluation.tasks.categorical import presented
from pyprune.evaluation.tasks.records import SHIPPED, full_prompt, kind_of

CHOICE = {"prompt": "One and one is", "choices": ["two", "three"], "answer": 0}
GENERATION = {"prompt": "One and one is", "answers": ["two", "2"]}
RETRIEVAL = {"query": "Why?", "document": "Because."}


def write(path: Path, *entries: Any) -> Path:
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries), encoding="utf-8")
    return path


def test_each_kind_is_told_by_its_fields(tmp_path: Path) -> None:
    more = {"context": "Naught and naught is naught.", "id": "sum/1", "source": "left alone"}
    choice = read_records(write(tmp_path / "a.jsonl", {**CHOICE, **more}, "  "))
    assert choice == (ChoiceRecord("One and one is", ("two", "three"), 0, more["context"], "sum/1"),)
    assert full_prompt(choice[0]) == "Naught and naught is naught.\nOne and one is"  # type: ignore[arg-type]
    generation = read_records(write(tmp_path / "b.jsonl", GENERATION, GENERATION))
    assert generation == (GenerationRecord("One and one is", ("two", "2")),) * 2
    assert full_prompt(generation[0]) == "One and one is"  # type: ignore[arg-type]
    # A line separator of Unicode inside a text ends no line of the file.
    retrieval = read_records(write(tmp_path / "c.jsonl", '{"query": "a\u2028b", "document": "c"}'))
    assert retrieval == (RetrievalRecord("a\u2028b", "c"),)
    assert [kind_of(r) for r in (choice, generation, retrieval)] == ["choice", "generation", "retrieval"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"task file must hold at least one task; got 'none in .*t\.jsonl'"),
        ([CHOICE, "{"], r"task file must be JSON lines; .*t\.jsonl:2 is not JSON"),
        (["[1]"], r"t\.jsonl:1 must be a JSON object; got 'list'"),
        (["[" * 100_000], r"t\.jsonl:1 is not JSON"),
        ([{"prompt": "x"}], r"t\.jsonl:1 must have the fields of one kind of task: prompt, choices, answer \(choice\)"),
        ([{**CHOICE, **GENERATION}], r"t\.jsonl:1 must have the fields of one kind"),
        ([CHOICE, GENERATION], r"t\.jsonl:2 must be of the same kind as the lines before it \(choice\); got 'gener"),
        ([{**CHOICE, "answer": 2}], r"t\.jsonl:1: answer must be an integer from 0 to 1; got 2"),
        ([{**CHOICE, "answer": -1}], r"answer must be an integer from 0 to 1; got -1"),
        ([{**CHOICE, "answer": True}], r"answer must be an integer from 0 to 1; got True"),
        ([{**CHOICE, "answer": "0"}], r"answer must be an integer from 0 to 1; got '0'"),
        ([{**CHOICE, "choices": ["two"]}], r"choices must be a list of at least 2 texts, none empty; got \['two'\]"),
        ([{**CHOICE, "choices": ["two", " "]}], r"choices must be a list of at least 2 texts, none empty"),
        ([{**CHOICE, "choices": ["two", "two"]}], r"choices must differ from each other"),
        ([{**CHOICE, "prompt": " "}], r"t\.jsonl:1: prompt must be a text that is not empty; got ' '"),
        ([{**CHOICE, "context": 1}], r"context must be a text; got 1"),
        ([{**GENERATION, "answers": []}], r"answers must be a list of at least 1 texts, none empty; got \[\]"),
        ([{**GENERATION, "answers": "two"}], r"answers must be a list of at least 1 texts"),
        ([{**RETRIEVAL, "document": 5}], r"t\.jsonl:1: document must be a text that is not empty; got 5"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_records(write(tmp_path / "t.jsonl", *lines))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task file must be an existing file; got .*none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"query": "é", "document": "x"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"task file must be UTF-8; .*latin\.jsonl is not"):
        read_records(tmp_path / "latin.jsonl")


def test_what_ships_is_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # as when the script is run
    files = importlib.import_module("bench.experiments.make_tasks").files()
    assert sorted(files) == sorted(f"{name}.jsonl" for name in SHIPPED)
    for name in SHIPPED:
        assert shipped(name).read_text(encoding="utf-8") == files[f"{name}.jsonl"], (
            "run python -m bench.experiments.make_tasks"
        )


def test_the_same_facts_are_asked_three_ways() -> None:
    choice, generation, yesno, retrieval = (read_records(shipped(name)) for name in SHIPPED[:4])
    assert len(choice) == len(generation) == len(yesno) >= 200
    assert [r.id for r in choice] == [r.id for r in generation] == [r.id for r in yesno]
    assert len({r.id for r in choice}) == len(choice)
    assert len(retrieval) == 60
    truths: dict[str, list[bool]] = {}
    for c, g, q in zip(choice, generation, yesno, strict=True):
        assert isinstance(c, ChoiceRecord) and isinstance(g, GenerationRecord) and isinstance(q, ChoiceRecord)
        assert (c.prompt, c.context) == (g.prompt, g.context) and len(c.choices) == 4
        right = c.choices[c.answer]
        assert right == g.answers[0] and not set(g.answers) & (set(c.choices) - {right}), f"{c.id}: two right options"
        said = [option for option in c.choices if option in q.prompt.replace("?", "").split()]
        said += [option for option in c.choices if " " in option and option in q.prompt]
        assert said, f"{q.id}: {q.prompt} names no option"
        true = q.choices[q.answer] == "yes"
        # The subject may be an option too (the month after March), so the option named last is the one that is asked.
        assert (right in said) == true or len(said) > 1, q.prompt
        truths.setdefault(c.id.split("/")[0], []).append(true)
    assert all(sum(t) - len(t) / 2 in (0, 0.5) for t in truths.values())
    answers = [c.answer for c in choice if isinstance(c, ChoiceRecord)]
    assert all(35 <= answers.count(i) <= 75 for i in range(4)), "the place of the answer gives it away"


def test_sentiment_and_translation_cannot_be_guessed() -> None:
    """As many of each answer, no item twice, none among the solved ones, and wrong options near to the right one."""
    sentiment, translation = (read_records(shipped(name)) for name in ("sentiment", "translation"))
    for records in (sentiment, translation):
        assert len({r.id for r in records}) == len({r.prompt for r in records}) == len(records) == 100
        assert not any(r.prompt in r.context for r in records)
    assert all(r.choices == ("positive", "negative") for r in sentiment)
    assert [sum(r.answer == i for r in sentiment) for i in (0, 1)] == [50, 50]
    assert all(len(r.choices) == 4 for r in translation)
    places = [sum(r.answer == i for r in translation) for i in range(4)]
    assert min(places) >= 15 and [r.prompt.split(":")[0] for r in translation].count("French") == 50
    # The longest or the shortest option is not the right one more often than guessing makes it.
    for pick in (min, max):
        assert sum(pick(r.choices, key=len) == r.choices[r.answer] for r in translation) <= 35


def test_lm_eval_is_shown_the_same_prompts() -> None:
    root = Path(__file__).parent.parent
    tasks = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (root / "examples/lm_eval").glob("*.yaml")}
    group = tasks.pop("pyprune_facts")
    assert sorted(group["task"]) == sorted(tasks) and all(task["task"] == name for name, task in tasks.items())
    for name, task in tasks.items():
        data = root / task["dataset_kwargs"]["data_files"]["test"]
        assert data in [shipped(n) for n in SHIPPED]
        records = read_records(data)
        lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        for record, entry in zip(records, lines, strict=True):
            asked = jinja2.Template(task["doc_to_text"], keep_trailing_newline=True).render(entry)
            assert not isinstance(record, RetrievalRecord)
            if isinstance(record, ChoiceRecord) and name != "pyprune_facts_choice":
                prompt, labels = presented(record)
                given = task["doc_to_choice"]
                assert asked == prompt and tuple(entry[given] if isinstance(given, str) else given) == labels
            else:
                assert asked == full_prompt(record)
            assert task["doc_to_target"] in entry


def test_passages_share_few_words_with_their_queries() -> None:
    def plain(text: str) -> set[str]:
        return {w.strip(".,;?").lower() for w in text.split() if len(w.strip(".,;?")) > 3}

    shares = []
    for record in read_records(shipped("retrieval")):
        assert isinstance(record, RetrievalRecord)
        query = plain(record.query)
        shares.append(len(query & plain(record.document)) / len(query))
    assert max(shares) <= 0.5 and sum(shares) / len(shares) < 0.1
