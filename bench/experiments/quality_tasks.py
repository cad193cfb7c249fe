"""Quality by task: text generation, translation, sentiment, question answering, of dense and pruned models.

    python -m bench.experiments.quality_tasks --data FOLDER --checkpoint "30 %=DIR" --checkpoint "50 %=DIR"
    python -m bench.experiments.quality_tasks --show              the table of what is there

Every model is asked the same items: those of the task files that ship, PIQA's from FOLDER, and the 32 prompts of
`eval --suite`. The score of each item is kept, so that a pruned model is compared with the dense one item by item.
`--random 0.7` adds a row of the dense model with random neurons removed, uniform widths and no repair. Each row is
written when it is there.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import by_line
from bench.tables.quality_tasks import quality_tasks_table
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.cli.screen import verb
from pyprune.evaluation.domains.texts import read_questions
from pyprune.evaluation.domains.writing import write
from pyprune.evaluation.tasks import choice_correct, generation_scores, read_records, shipped
from pyprune.model.loading import DEMO, load_model, load_tokenizer

OUT = Path(__file__).parents[1] / "results" / "quality-tasks.json"
# Task -> the metric that is shown of it: of options by the mean over tokens where they differ in length.
CHOICES = {"sentiment": "accuracy_token", "translation": "accuracy_token", "choice": "accuracy_token"}
PIQA, FACTS, REPEATS = "piqa", "generation", "repeats"
NEW_TOKENS = 96
Scores = dict[str, list[float]]
Result = dict[str, Any]


def scores(model: Any, tokenizer: Any, data: Path, items: int) -> Scores:
    """By task the score of each item, in the order of the items; of `repeats` the share of 4-grams repeated."""
    found: Scores = {}
    with torch.no_grad():
        for name, metric in CHOICES.items():
            found[name] = choice_correct(model, tokenizer, read_records(shipped(name)))[metric].tolist()  # type: ignore[arg-type]
        questions = read_questions(data, items)
        found[PIQA] = choice_correct(model, tokenizer, questions)["accuracy_byte"].tolist()
        found[FACTS] = generation_scores(model, tokenizer, read_records(shipped(FACTS)))["exact"].tolist()  # type: ignore[arg-type]
        found[REPEATS] = list(write(model, tokenizer, NEW_TOKENS).repetition)
    return found


def load(path: Path) -> Result:
    """The result at `path`, or an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}  # type: ignore[no-any-return]


@verb
def main(
    data: Annotated[Path | None, typer.Option(help="Folder with piqa/.")] = None,
    model: Annotated[str, typer.Option(help="The dense model.")] = DEMO,
    checkpoint: Annotated[list[str] | None, typer.Option(help="LABEL=DIR of a pruned one; repeat for more.")] = None,
    random: Annotated[list[float] | None, typer.Option(help="Share kept by a random row; repeat for more.")] = None,
    items: Annotated[int, typer.Option(help="Of PIQA at most; 0 for all.")] = 0,
    out_file: Annotated[Path, typer.Option("--out", help="The result.")] = OUT,
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing.")] = False,
) -> None:
    """Ask every model that is not there yet, and show the table."""
    result = load(out_file)
    if not show_only:
        places = [text.partition("=") for text in checkpoint or []]
        for label, _, place in places:
            fits = bool(label.strip()) and Path(place).is_dir()
            check(fits, "checkpoint", "be LABEL=DIR of an existing folder", f"{label}={place}")
        check(data is not None, "data", "be a folder with piqa/", data)
        facts = {"model": model if model == DEMO else Path(model).name, "items": items, "new_tokens": NEW_TOKENS}
        old = {key: result[key] for key in facts if key in result}
        check(old in ({}, facts), "out", f"hold rows of the same model and items: {facts}", old)
        command = shlex.join(["python", "-m", "bench.experiments.quality_tasks", *sys.argv[1:]])
        result = {**facts, "machine": machine.facts(), "command": command, "rows": result["rows"]}
        tokenizer = load_tokenizer(model)
        rows = {"dense": model, **{label: place for label, _, place in places}}
        wanted = [(label, place, None) for label, place in rows.items()]
        wanted += [(f"{1 - keep:.0%} removed at random", model, keep) for keep in random or []]
        for label, place, keep in wanted:
            if label in result["rows"]:
                continue
            asked = load_model(place, "bfloat16")
            if keep is not None:
                prune(asked, keep, "random", repair=None)
            result["rows"][label] = {
                "scores": scores(asked, tokenizer, data, items),  # type: ignore[arg-type]
                "parameters": sum(p.numel() for p in asked.parameters()),
                "commit": machine.source()["commit"],
            }
            with new_file(out_file) as temporary:
                temporary.write_text(by_line.dumps(result, ("rows",)), encoding="utf-8")
            typer.echo(f"{label}: asked")
    typer.echo("\n".join(quality_tasks_table(result)))


if __name__ == "__main__":
    typer.run(main)
