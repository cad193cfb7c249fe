"""Quality by task: sentiment, translation and generation, of dense and pruned models, by the task files that ship.

    python -m bench.experiments.quality_tasks --checkpoint "30 % removed=DIR" --checkpoint "50 % removed=DIR"
    python -m bench.experiments.quality_tasks --random 0.7        also with random neurons removed, without repair

Every model is asked the same items. The score of each is kept, so that a pruned model is compared with the dense one
item by item. Each row is written when it is there. Question answering (PIQA) and repetition of the same models stand in
compare-suite.json, from where the table takes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from bench import by_line
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.cli.screen import verb
from pyprune.evaluation.tasks import choice_correct, generation_scores, read_records, shipped
from pyprune.model.loading import DEMO, load_model, load_tokenizer

OUT = Path(__file__).parents[1] / "results" / "quality-tasks.json"
# Task -> the metric that is shown of it.
TASKS = {"sentiment": "accuracy_token", "translation": "accuracy_token", "generation": "exact"}
Scores = dict[str, list[float]]
Result = dict[str, Any]


@torch.no_grad()
def scores(model: Any, tokenizer: Any) -> Scores:
    """By task the score of each item, in the order of its file."""
    found: Scores = {}
    for name, metric in TASKS.items():
        records = cast(Any, read_records(shipped(name)))
        ask = generation_scores if name == "generation" else choice_correct
        found[name] = ask(model, tokenizer, records)[metric].tolist()
    return found


def load(path: Path) -> Result:
    """The result at `path`, or an empty one."""
    return cast(Result, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {"rows": {}}


@verb
def main(
    model: Annotated[str, typer.Option(help="The dense model.")] = DEMO,
    checkpoint: Annotated[list[str] | None, typer.Option(help="LABEL=DIR of a pruned one; repeat for more.")] = None,
    random: Annotated[list[float] | None, typer.Option(help="Share kept by a random row; repeat for more.")] = None,
    out_file: Annotated[Path, typer.Option("--out", help="The result.")] = OUT,
) -> None:
    """Ask every model that is not there yet."""
    result = load(out_file)
    places = [text.partition("=") for text in checkpoint or []]
    for label, _, place in places:
        fits = bool(label.strip()) and bool(place) and Path(place).is_dir()
        check(fits, "checkpoint", "be LABEL=DIR of an existing folder", f"{label}={place}")
    name = model if model == DEMO else Path(model).name
    check(result.get("model", name) == name, "out", f"hold rows of {name}", result.get("model"))
    result = {"model": name, "machine": machine.facts(), "rows": result["rows"]}
    tokenizer = load_tokenizer(model)
    wanted: list[tuple[str, str, float | None]] = [("dense", model, None)]
    wanted += [(label, place, None) for label, _, place in places]
    wanted += [(f"{1 - keep:.0%} removed at random", model, keep) for keep in random or []]
    for label, place, keep in wanted:
        if label in result["rows"]:
            continue
        asked = load_model(place, "bfloat16")
        if keep is not None:
            prune(asked, keep, "random", allocation="uniform:multiple=16", repair=None)
        found = scores(asked, tokenizer)
        facts = {"parameters": sum(p.numel() for p in asked.parameters()), "commit": machine.source()["commit"]}
        result["rows"][label] = {"scores": found, **facts}
        with new_file(out_file) as temporary:
            temporary.write_text(by_line.dumps(result, ("rows",)), encoding="utf-8")
        means = ", ".join(f"{task} {sum(of) / len(of):.1%}" for task, of in found.items())
        typer.echo(f"{label}: {means}")


if __name__ == "__main__":
    typer.run(main)
