"""Write the task files that ship with the package, from the tables beside this script.

    python -m bench.experiments.make_tasks            writes {choice,generation,yesno,retrieval,...}.jsonl

The same facts are asked three ways, under the same ids and in the same order: as a choice of four, as text to complete,
and as a question for yes or no. Of reviews it is asked what they feel, and of sentences which is their English, behind
a few that are solved. Nothing here is drawn without its seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bench.experiments.task_facts import RELATIONS, Relation
from bench.experiments.task_passages import PASSAGES
from bench.experiments.task_sentiment import GLAD, SHOWN, SORRY
from bench.experiments.task_translations import PAIRS
from bench.experiments.task_translations import SHOWN as TRANSLATED
from pyprune.base.files import new_file

DATA = Path(__file__).parents[2] / "pyprune" / "evaluation" / "tasks" / "data"
OPTIONS = 4
SEED = 6

Entry = dict[str, Any]


def _answers(relation: Relation, subject: str) -> tuple[str, ...]:
    found = relation.facts[subject]
    return found if isinstance(found, tuple) else (found,)


def _wrong(relation: Relation, subject: str, rng: random.Random) -> list[str]:
    """Wrong answers to one fact: its own, or those of the relation's other facts."""
    if subject in relation.wrong:
        return list(relation.wrong[subject])
    right = _answers(relation, subject)
    others = {_answers(relation, other)[0] for other in relation.facts} | {relation.shown[1]}
    return rng.sample(sorted(others - set(right)), OPTIONS - 1)


def facts() -> tuple[list[Entry], list[Entry], list[Entry]]:
    """The lines of choice, generation and yes or no, fact by fact."""
    rng = random.Random(SEED)
    choice: list[Entry] = []
    generation: list[Entry] = []
    yesno: list[Entry] = []
    for relation in RELATIONS:
        context = f"{relation.stem.format(relation.shown[0])} {relation.shown[1]}."
        # As many true as false in every relation, or one more.
        truths = [i % 2 == 0 for i in range(len(relation.facts))]
        rng.shuffle(truths)
        for subject, true in zip(relation.facts, truths, strict=True):
            name, prompt = f"{relation.name}/{subject}", relation.stem.format(subject)
            answers = _answers(relation, subject)
            wrong = _wrong(relation, subject, rng)
            options = [answers[0], *wrong]
            rng.shuffle(options)
            start = {"id": name, "context": context, "prompt": prompt}
            choice.append({**start, "choices": options, "answer": options.index(answers[0])})
            generation.append({**start, "answers": list(answers)})
            question = relation.question.format(subject, answers[0] if true else rng.choice(wrong))
            yesno.append({"id": name, "prompt": question, "choices": ["yes", "no"], "answer": int(not true)})
    return choice, generation, yesno


FEELINGS = ("positive", "negative")


def sentiment() -> list[Entry]:
    """The lines of sentiment, in a drawn order."""
    lines = [f"Review: {text}\nSentiment: {FEELINGS[not glad]}" for text, glad in SHOWN]
    entries = [
        {
            "id": f"{feeling}/{i}",
            "context": "\n\n".join(lines) + "\n",
            "prompt": f"Review: {text}\nSentiment:",
            "choices": list(FEELINGS),
            "answer": FEELINGS.index(feeling),
        }
        for feeling, texts in zip(FEELINGS, (GLAD, SORRY), strict=True)
        for i, text in enumerate(texts)
    ]
    random.Random(SEED).shuffle(entries)
    return entries


def translation() -> list[Entry]:
    """The lines of translation, language by language."""
    rng = random.Random(SEED)
    entries = []
    for language, pairs in PAIRS.items():
        context = "\n\n".join(f"{language}: {text}\nEnglish: {english}" for text, english in TRANSLATED[language])
        for i, (text, right, *wrong) in enumerate(pairs):
            options = [right, *wrong]
            rng.shuffle(options)
            start = {"id": f"{language}/{i}", "context": f"{context}\n", "prompt": f"{language}: {text}\nEnglish:"}
            entries.append({**start, "choices": options, "answer": options.index(right)})
    return entries


def files() -> dict[str, str]:
    """File name -> its text."""
    choice, generation, yesno = facts()
    retrieval = [{"id": f"passage/{i}", "query": q, "document": d} for i, (q, d) in enumerate(PASSAGES)]
    lines = {"choice": choice, "generation": generation, "yesno": yesno, "retrieval": retrieval}
    lines |= {"sentiment": sentiment(), "translation": translation()}
    return {
        f"{name}.jsonl": "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        for name, entries in lines.items()
    }


def main() -> None:
    """Write the files."""
    for name, text in files().items():
        with new_file(DATA / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
